"""Run folders for the tests: golden records, changed as a test needs them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from flashhead_dist.bench.records import Record, RecordWriter, read_records
from flashhead_dist.report.runs import RunFolder, load_run

GOLDEN = Path(__file__).parent / "data" / "records.jsonl"
"""3 heads at tp 1 and 2, measured, and tp 8, projected; batch 1 and 4."""


def golden() -> list[Record]:
    return read_records(GOLDEN)


def environment_of(records: Sequence[Record]) -> dict[str, Any]:
    """As scale.py leaves it at the end of a run."""
    heads = list(dict.fromkeys(record.head for record in records))
    times = {"1": [100.0, 400.0], "2": [210.0, 410.0], "4": [430.0, 420.0]}
    crossover = {"changes_at": [3], "times_us": times, "origin": "measured now", "not_kept": None}
    return {
        "heads": heads,
        "arguments": {
            "tp_sizes": str(sorted({record.tp_size for record in records})),
            "batch_sizes": str(sorted({record.batch_size for record in records})),
        },
        "crossovers": {"1": crossover, "2": crossover | {"changes_at": []}},
    }


def pipeline_document() -> dict[str, Any]:
    """As bench_pipeline.py --json prints it."""
    rows = [
        {
            "micro_batches": m,
            "schedule": schedule,
            "formula_bubble": 1 / (m + 1),
            "tokens_per_s": 10.0 * m,
            "stage_idle_shares": [0.4, 0.5],
            "stage_step_ms": [12.0, 14.0],
            "measured_bubble": 1 / (m + 1) + 0.05,
            "ideal_bubble": 1 / (m + 1) + 0.02,
        }
        for m in (1, 2, 4)
        for schedule in ("continuous", "flushed")
    ]
    given = {"pp_size": "2", "sleep_ms": "None", "model": "None", "head": "flashhead"}
    more = {"new_tokens": "32", "repeats": "3", "oversubscribed": False}
    return given | more | {"results": rows}


def write_run(
    folder: Path,
    records: Sequence[Record] | None = None,
    *,
    environment: dict[str, Any] | None = None,
    pipeline: dict[str, Any] | None = None,
) -> Path:
    """Write a run folder; golden records and a finished run's environment where not given."""
    records = golden() if records is None else records
    folder.mkdir(parents=True)
    with RecordWriter(folder / "records.jsonl") as writer:
        for record in records:
            writer.write(record)
    found = environment_of(records) if environment is None else environment
    (folder / "environment.json").write_text(json.dumps(found))
    if pipeline is not None:
        (folder / "pipeline.json").write_text(json.dumps(pipeline))
    return folder


def run_of(folder: Path, records: Sequence[Record] | None = None, **more: Any) -> RunFolder:
    return load_run(write_run(folder, records, **more))


def changed(change: Callable[[Record], dict[str, Any]]) -> list[Record]:
    """Golden records with the fields that `change` gives for each."""
    return [replace(record, **change(record)) for record in golden()]


def faster(share: float, *heads: str) -> list[Record]:
    """Golden records whose measured latencies of `heads` (all, where none) are multiplied."""

    def change(record: Record) -> dict[str, Any]:
        if (heads and record.head not in heads) or not record.measured:
            return {}
        names = ("median_us", "p10_us", "p90_us", "compute_us")
        return {name: getattr(record, name) * share for name in names}

    return changed(change)
