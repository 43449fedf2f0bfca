"""Where the time of a step goes: on each rank, and along the rank that computes longest.

Letters: R ranks of the group, N iterations, E exchanges a step.

A rank's step is `centroids + candidates + other + exchange + waiting`. The ranks enter an exchange
at different times; who enters last waits for nobody. So the shortest of the R durations of one
exchange is the wire's own time, and what the others take beyond it is waiting for the slowest rank
(what Scalasca calls *wait at N x N*, found here without clocks that agree). Ranks leave an exchange
at slightly different times too, which counts as waiting.

Ranges are recorded in rounds of their own, so that the timed rounds stay as they are. A listener
makes a retrieval head score its centroids and its candidates in two calls where it otherwise makes
one, and costs some two microseconds a range, which `other` contains. On CUDA the step is launched
from Python, whether or not the timed rounds replay it as a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from flashhead_dist.bench.control import Control
from flashhead_kernels.timing import Clock, time_steps
from flashhead_profiles.ranges import (
    CANDIDATES,
    CENTROIDS,
    EXCHANGE,
    STEP,
    Span,
    annotate,
    recording,
)

COMPUTE_PARTS = ("centroids", "candidates", "other")
PARTS = (*COMPUTE_PARTS, "exchange", "waiting")
_SLOW_BY = 1.1
_Array = npt.NDArray[np.float64]


class Quantiles(NamedTuple):
    """Of one part over iterations, in microseconds."""

    p10: float
    median: float
    p90: float


class SlowRank(NamedTuple):
    """A rank that computes longer than the others, and by how much over their median."""

    rank: int
    excess_us: float


@dataclass(frozen=True, kw_only=True)
class StepSplit:
    """The parts of a step, `PARTS`; None for a part that was not measured, as `method` says.

    step_us: along the rank that computes longest in each iteration, so that its compute and the
        exchange add up to the step (medians add up only nearly). Its `waiting` is that of the rank
        that waits longest: the others' idle time, no part of that rank's step.
    by_rank_us: of every rank, in rank order; there the parts add up to the rank's `step`.
    slow_rank: a rank whose compute exceeds every other rank's nine times in ten (its p10 the p90 of
        each), and whose median exceeds the median of theirs by 10 % or more; None where none does.
    """

    method: str
    num_iterations: int
    step_us: dict[str, Quantiles | None]
    by_rank_us: dict[str, list[Quantiles] | None]
    slow_rank: SlowRank | None

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> StepSplit:
        """Read what `dataclasses.asdict` and JSON made of one; raises TypeError or KeyError."""
        by_rank = value["by_rank_us"]
        slow = value["slow_rank"]
        return cls(
            **dict(value)
            | {
                "step_us": {part: q and Quantiles(*q) for part, q in value["step_us"].items()},
                "by_rank_us": {p: qs and [Quantiles(*q) for q in qs] for p, qs in by_rank.items()},
                "slow_rank": slow and SlowRank(*slow),
            }
        )


@dataclass(frozen=True)
class RankParts:
    """One rank's N iterations of one head, in microseconds; exchanges_us: those of each
    iteration, which may have different numbers of them."""

    steps_us: Sequence[float]
    centroids_us: Sequence[float]
    candidates_us: Sequence[float]
    exchanges_us: Sequence[Sequence[float]]


def parts_of_steps(steps: Iterable[Sequence[Span]]) -> RankParts:
    """Reduce the ranges recorded in each of N steps, a STEP around the others."""
    rows = [
        (
            _total(spans, STEP),
            _total(spans, CENTROIDS),
            _total(spans, CANDIDATES),
            tuple(span.duration_us for span in spans if span.name == EXCHANGE),
        )
        for spans in steps
    ]
    step, centroids, candidates, exchanges = zip(*rows, strict=True)
    return RankParts(step, centroids, candidates, exchanges)


def split_together(ranks: Sequence[RankParts], method: str) -> StepSplit:
    """Split the N steps that R ranks took together.

    Raises:
        ValueError: no rank, or ranks that differ in iterations or in exchanges.
    """
    parts = _compute_parts(ranks)
    durations = _exchanges(ranks)
    wire = durations.min(axis=0)
    parts["exchange"] = np.broadcast_to(wire.sum(axis=1), durations.shape[:2])
    parts["waiting"] = (durations - wire).sum(axis=2)
    return _split(parts, method)


def split_isolated(ranks: Sequence[RankParts], method: str) -> StepSplit:
    """Split the N steps that each of R ranks replayed by itself, without exchanges.

    What a rank would wait is the longest compute of the same iteration less its own; the wire's
    time is not known.
    """
    parts = _compute_parts(ranks)
    compute = _compute(parts)
    parts["waiting"] = compute.max(axis=0) - compute
    return _split(parts, method)


def find_slow_rank(compute_us: _Array) -> SlowRank | None:
    """The rank, if any, that stands out in `compute_us [R, N]`; see `StepSplit`."""
    if compute_us.shape[0] < 2:
        return None
    medians = np.median(compute_us, axis=1)
    slow = int(medians.argmax())
    others = np.delete(compute_us, slow, axis=0)
    usual = float(np.median(np.median(others, axis=1)))
    # Not its median: other work on the machine may take half of one rank's steps.
    above_all = np.percentile(compute_us[slow], 10) > np.percentile(others, 90, axis=1).max()
    if not above_all or medians[slow] < _SLOW_BY * usual:
        return None
    return SlowRank(slow, float(medians[slow] - usual))


def _exchanges(ranks: Sequence[RankParts]) -> _Array:
    """`[R, N, E]`: E of the iteration that has most; others, such as those of a head that takes a
    second look at some rows only, are filled up with exchanges of no time."""
    if len({tuple(map(len, rank.exchanges_us)) for rank in ranks}) != 1:
        raise ValueError("every rank needs the same number of exchanges")
    most = max(map(len, ranks[0].exchanges_us))
    rows = [[(*each, *[0.0] * (most - len(each))) for each in rank.exchanges_us] for rank in ranks]
    return np.array(rows)


def _compute_parts(ranks: Sequence[RankParts]) -> dict[str, _Array]:
    """`centroids`, `candidates` and `other`, each `[R, N]`."""
    if not ranks or len({len(rank.steps_us) for rank in ranks}) != 1:
        raise ValueError("every rank needs the same number of iterations, one or more")
    centroids = np.array([rank.centroids_us for rank in ranks])
    candidates = np.array([rank.candidates_us for rank in ranks])
    exchange = np.array([[sum(each) for each in rank.exchanges_us] for rank in ranks])
    other = np.array([rank.steps_us for rank in ranks]) - centroids - candidates - exchange
    return {"centroids": centroids, "candidates": candidates, "other": other}


def _compute(parts: Mapping[str, _Array]) -> _Array:
    return sum((parts[name] for name in COMPUTE_PARTS[1:]), parts[COMPUTE_PARTS[0]])


def _split(parts: Mapping[str, _Array], method: str) -> StepSplit:
    compute = _compute(parts)
    iterations = np.arange(compute.shape[1])
    longest = compute.argmax(axis=0)
    path = {name: found[longest, iterations] for name, found in parts.items()}
    path["waiting"] = parts["waiting"].max(axis=0)
    path["step"] = sum(
        (path[name] for name in (*COMPUTE_PARTS, "exchange") if name in path),
        np.zeros(len(longest)),
    )
    whole = sum(parts.values(), np.zeros(compute.shape))
    known = dict(parts) | {"step": whole}
    names = ("step", *PARTS)
    complete = "exchange" in parts
    return StepSplit(
        method=method,
        num_iterations=compute.shape[1],
        step_us={
            name: _quantiles(path[name]) if _is_known(name, path, complete) else None
            for name in names
        },
        by_rank_us={
            name: [_quantiles(rank) for rank in known[name]]
            if _is_known(name, known, complete)
            else None
            for name in names
        },
        slow_rank=find_slow_rank(compute),
    )


def _is_known(name: str, parts: Mapping[str, _Array], complete: bool) -> bool:
    return name in parts and (complete or name != "step")


def _quantiles(values: _Array) -> Quantiles:
    return Quantiles(*(float(value) for value in np.percentile(values, (10, 50, 90))))


def _total(spans: Sequence[Span], name: str) -> float:
    return sum(span.duration_us for span in spans if span.name == name)


_TOGETHER = (
    "ranges recorded in rounds of their own, all ranks at work; waiting: what a rank's exchange "
    "takes beyond the shortest of all ranks"
)
_ISOLATED = (
    "ranges recorded while each rank replayed its part alone, all others asleep; waiting: "
    "PROJECTED, the longest compute of the same iteration less the rank's own; exchange: not "
    "measured, since ranks share cores"
)


def time_parts(
    work: Mapping[str, Callable[[int], object]],
    num_iterations: int,
    device: torch.device,
    clock: Clock,
) -> dict[str, RankParts]:
    """Run `num_iterations` rounds of `work(iteration)` of each head on this rank, in turn.

    clock: readies a step, whose times come from its ranges, not from the clock.
    """
    with recording(device) as recorder:

        def recorded(name: str, iteration: int) -> list[Span]:
            clock.ready()
            with annotate(STEP):
                work[name](iteration)
            return recorder.take()

        steps = time_steps({name: partial(recorded, name) for name in work}, num_iterations)
    return {name: parts_of_steps(found) for name, found in steps.items()}


def split_over_ranks(
    mine: Mapping[str, RankParts], control: Control, *, isolated: bool
) -> dict[str, StepSplit]:
    """Reduce what every rank of `control` recorded; the same on all of them."""
    ranks = control.gather({name: asdict(parts) for name, parts in mine.items()})
    splits = {}
    for name in mine:
        parts = [RankParts(**rank[name]) for rank in ranks]
        splits[name] = (
            split_isolated(parts, _ISOLATED) if isolated else split_together(parts, _TOGETHER)
        )
    return splits
