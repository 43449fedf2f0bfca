"""Two runs cell by cell: what changed, and whether the change exceeds the noise.

A latency's noise is half the width from p10 to p90 over its median, of both runs together in
quadrature: a change must leave what single iterations of either run scatter by. That is some four
times the standard error that independent iterations would give a median of twenty; iterations of
one run are not independent, and between two runs a machine drifts. Bytes and agreement do not
scatter: the algorithm sets them, so any change of them is marked. Counted bytes scatter as their
bursts did. Projected latencies have no measured scatter and are not compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import exp, hypot, log
from typing import Literal

from flashhead_dist.bench.records import Record
from flashhead_dist.report.runs import Run

Verdict = Literal["better", "worse", "within noise", "same"]
LOWER_IS_BETTER = {
    "median_us": True,
    "counted_bytes_per_row": True,
    "sent_bytes_per_row": True,
    "weight_bytes_per_rank": True,
    "peak_bytes_per_rank": True,
    "top1_agreement": False,
    "top1_agreement_worst_source": False,
}
"""Figures that are compared, and which way is good."""
_ONCE_A_SIZE = ("weight_bytes_per_rank", "peak_bytes_per_rank")
_AGREEMENT = ("top1_agreement", "top1_agreement_worst_source")
_PEAK_NOISE, _PEAK_NOISE_BYTES = 0.05, 10e6
"""By how much a peak of resident memory moves between two runs of the same code."""


@dataclass(frozen=True)
class Change:
    """One figure of one cell in two runs; `change` and `noise` are shares of `before`."""

    run: str
    figure: str
    head: str
    tp_size: int
    batch_size: int
    before: float
    after: float
    change: float
    noise: float
    verdict: Verdict


def compare_runs(baseline: Run, run: Run) -> list[Change]:
    """All changes of cells that both runs have, in the order of `run`'s records."""
    changes: list[Change] = []
    seen: set[tuple[str, str, int]] = set()
    for figure in LOWER_IS_BETTER:
        for record in run.records:
            once = (figure, record.head, record.tp_size)
            if figure in (*_ONCE_A_SIZE, *_AGREEMENT) and once in seen:
                continue
            before = baseline.find(record.head, record.tp_size, record.batch_size)
            change = _change(figure, before, record, run.letter) if before else None
            if change is not None:
                seen.add(once)
                changes.append(change)
    return changes


def differences(baseline: Run, run: Run) -> list[str]:
    """What the runs differ in besides their figures, as `name: before -> after`."""
    names = (
        "system", "device", "os", "backend", "dtype", "threads_per_rank", "commit", "model",
        "model_hash", "index_hash", "num_probes", "alpha", "escalate_below",
        "seed",
    )  # fmt: skip
    pairs = [(name, getattr(baseline.first, name), getattr(run.first, name)) for name in names]
    theirs, ours = baseline.first.versions, run.first.versions
    pairs += [(name, theirs.get(name), ours.get(name)) for name in sorted({*theirs, *ours})]
    return [
        f"{name}: {_short(before)} → {_short(after)}"
        for name, before, after in pairs
        if before != after
    ]


def latency_noise(before: Record, after: Record) -> float:
    """Noise of a latency's change as a share; both records are measured."""
    return hypot(_half_width(before), _half_width(after))


def _half_width(record: Record) -> float:
    assert record.p10_us is not None
    assert record.p90_us is not None
    assert record.median_us is not None
    return (record.p90_us - record.p10_us) / (2 * record.median_us)


def _change(figure: str, before: Record, after: Record, letter: str) -> Change | None:
    old, new = getattr(before, figure), getattr(after, figure)
    if old is None or new is None or old == 0:
        return None
    if figure == "median_us" and not (before.measured and after.measured):
        return None
    noise = _noise(figure, before, after)
    share = new / old - 1
    verdict: Verdict = "same"
    # On a logarithm a halving and a doubling are as far from each other's noise.
    if share != 0 and abs(log(new / old) if new > 0 else share) <= log(1 + noise):
        verdict = "within noise"
    elif share != 0:
        verdict = "better" if (share < 0) is LOWER_IS_BETTER[figure] else "worse"
    return Change(
        letter, figure, after.head, after.tp_size, after.batch_size, old, new, share, noise, verdict
    )


def _noise(figure: str, before: Record, after: Record) -> float:
    if figure == "median_us":
        return exp(latency_noise(before, after)) - 1
    if figure == "peak_bytes_per_rank":
        return _PEAK_NOISE + _PEAK_NOISE_BYTES / (before.peak_bytes_per_rank or 1)
    if figure == "counted_bytes_per_row":
        return hypot(_burst_width(before), _burst_width(after))
    return 0.0


def _burst_width(record: Record) -> float:
    least, most = record.counted_bytes_per_row_least, record.counted_bytes_per_row_greatest
    counted = record.counted_bytes_per_row
    return 0.0 if least is None or most is None or not counted else (most - least) / counted


def summary(changes: Sequence[Change]) -> list[str]:
    """Sentences: how many latencies changed beyond the noise, and how many of the others."""
    sentences = []
    wanted: list[tuple[str, Callable[[Change], bool]]] = [
        ("step latencies", lambda change: change.figure == "median_us"),
        ("figures of bytes, memory and agreement", lambda change: change.figure != "median_us"),
    ]
    for name, belongs in wanted:
        mine = [change for change in changes if belongs(change)]
        if not mine:
            continue
        better = sum(change.verdict == "better" for change in mine)
        worse = sum(change.verdict == "worse" for change in mine)
        sentences.append(
            f"Of {len(mine)} {name} that both runs have, {better} are better and {worse} are "
            f"worse beyond the noise."
        )
    return sentences


def _short(value: object) -> str:
    text = str(value)
    return text[:12] + "…" if len(text) == 64 else text
