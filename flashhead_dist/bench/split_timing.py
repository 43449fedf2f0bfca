"""Rounds of their own in which ranges are recorded, so that the timed rounds stay as they are.

A listener makes a retrieval head score its centroids and its candidates in two calls where it
otherwise makes one, and costs some two microseconds a range, which `other` contains. On CUDA the
step is launched from Python, whether or not the timed rounds replay it as a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from flashhead_dist.bench.alone import Recording, replay_step
from flashhead_dist.bench.control import Control
from flashhead_dist.bench.split import (
    RankParts,
    StepSplit,
    parts_of_steps,
    split_alone,
    split_together,
)
from flashhead_dist.bench.timing import Clock
from flashhead_dist.heads.base import Head
from flashhead_profiles.ranges import STEP, annotate
from flashhead_profiles.recorder import Span, recording

TOGETHER = (
    "ranges recorded in rounds of their own, all ranks at work; waiting: what a rank's exchange "
    "takes beyond the shortest of all ranks"
)
ALONE = (
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

    clock: readies a step, whose times come from its ranges.
    """
    names = list(work)
    steps: dict[str, list[list[Span]]] = {name: [] for name in names}
    with recording(device) as recorder:
        for iteration in range(num_iterations):
            first = iteration % len(names)
            for name in names[first:] + names[:first]:
                clock.ready()
                with annotate(STEP):
                    work[name](iteration)
                steps[name].append(recorder.take())
    return {name: parts_of_steps(found) for name, found in steps.items()}


def together_work(
    heads: Mapping[str, Head], batches: Sequence[Tensor]
) -> dict[str, Callable[[int], object]]:
    """One step of each head on the iteration's batch `[B, D]`, with the group."""

    def of(head: Head) -> Callable[[int], object]:
        return lambda iteration: head.forward(batches[iteration % len(batches)])

    return {name: of(head) for name, head in heads.items()}


def alone_work(
    heads: Mapping[str, Head],
    batches: Sequence[Tensor],
    recordings: Mapping[str, Sequence[Recording]],
) -> dict[str, Callable[[int], object]]:
    """One step of each head replayed on this rank; `recordings[name][i]` is that of batch i."""

    def of(name: str) -> Callable[[int], object]:
        known = recordings[name]

        def step(iteration: int) -> None:
            index = iteration % len(known)
            replay_step(heads[name], batches[index], known[index])

        return step

    return {name: of(name) for name in heads}


def split_over_ranks(
    mine: Mapping[str, RankParts], control: Control, *, alone: bool
) -> dict[str, StepSplit]:
    """Reduce what every rank of `control` recorded; the same on all of them."""
    ranks = control.gather({name: parts.as_json() for name, parts in mine.items()})
    splits = {}
    for name in mine:
        parts = [RankParts.from_json(rank[name]) for rank in ranks]
        splits[name] = split_alone(parts, ALONE) if alone else split_together(parts, TOGETHER)
    return splits
