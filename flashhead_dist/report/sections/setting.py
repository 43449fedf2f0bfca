"""What was measured on what: one column a run, one row a fact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from flashhead_dist.bench.records import Record
from flashhead_dist.report.runs import Run

KEY = "setting"


def setting_frame(runs: Sequence[Run]) -> pd.DataFrame:
    """Facts by run, `differs` true where the runs do not share one."""
    facts = [_facts(run) for run in runs]
    names = list(dict.fromkeys(name for fact in facts for name in fact))
    rows = []
    for name in names:
        values = [fact.get(name, "") for fact in facts]
        row: dict[str, object] = {"fact": name}
        row |= {run.letter: value for run, value in zip(runs, values, strict=True)}
        rows.append(row | {"differs": len(set(values)) > 1})
    return pd.DataFrame(rows)


def warnings_of(run: Run) -> list[str]:
    """What a reader must know before any figure: made-up models, ranks that share cores, gaps."""
    warnings = list(run.flaws)
    if run.first.synthetic:
        warnings.append(f"The model is SYNTHETIC ({run.first.model}): no claim about fidelity.")
    over = {r.tp_size: r.oversubscription for r in run.records if r.oversubscribed}
    if over:
        sizes = ", ".join(map(str, sorted(over)))
        warnings.append(
            f"OVERSUBSCRIBED at tp {sizes} ({over[max(over)]}): latencies there are PROJECTED from "
            f"each rank's compute measured alone, and nothing about speed there was measured."
        )
    if run.first.commit.endswith("-dirty"):
        warnings.append(f"Commit {run.first.commit}: the code had changes that no commit holds.")
    return warnings


def standing_of(run: Run) -> list[str]:
    """What the ranks stand on, and what follows from it with its reason; empty where not told."""
    topology = run.environment.get("topology")
    if not isinstance(topology, Mapping):
        return []
    choices = topology.get("choices", [])
    lines = [topology.get("drawing", "")]
    lines += [f"{choice['name'].replace('_', ' ')}: {choice['reason']}" for choice in choices]
    return [str(line) for line in lines if line]


def _facts(run: Run) -> dict[str, str]:
    first = run.first
    iterations = sorted({record.num_iterations for record in run.records})
    return {
        "run": run.folder.resolve().name,
        "measured": _time_span(run.records),
        "system": f"{first.system}: {first.device}",
        "OS": first.os,
        "ranks": f"up to {max(run.tp_sizes)} of {first.world_size} started, "
        f"{first.threads_per_rank} thread{'' if first.threads_per_rank == 1 else 's'} each",
        "backend": first.backend,
        "model": f"{first.model}{' (SYNTHETIC)' if first.synthetic else ''}, {first.dtype}",
        "weights": first.model_hash[:12],
        "index": first.index_hash[:12] if first.index_hash else "none",
        "probes": "the index's own" if first.num_probes is None else str(first.num_probes),
        "escalation": "the index's own"
        if first.escalate_below is None
        else f"margins below {first.escalate_below:g} logits",
        "commit": first.commit,
        "batch sizes": ", ".join(map(str, run.batch_sizes)),
        "tp sizes": ", ".join(map(str, run.tp_sizes)),
        "iterations": str(iterations[0])
        if len(iterations) == 1
        else f"{iterations[0]} to {iterations[-1]} a head and cell",
        "software": ", ".join(f"{name} {number}" for name, number in first.versions.items()),
    }


def _time_span(records: Sequence[Record]) -> str:
    first, last = records[0].time_utc, records[-1].time_utc
    return f"{first[:16].replace('T', ' ')} to {last[11:16]} UTC"
