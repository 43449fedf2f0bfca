"""Time steps of several heads, interleaved, and reduce the ranks' times to one latency.

A step is one `forward` on every rank of the group. In every round each head takes one step, in an
order that rotates, so that a drift of the machine falls on all alike and no head always follows the
same one. Ranks meet before each step; what they differ by when they leave the meeting is part of
the step, so a latency is an upper bound by that skew.

Letters: R ranks of the group, N iterations.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashhead_dist.collectives import TensorParallel
from flashhead_dist.heads.base import Head
from flashhead_profiles.ranges import STEP, annotate

Step = Callable[[int], tuple[float, float]]
"""Takes the iteration's number, returns (wall, communication) in microseconds on this rank."""


@dataclass(frozen=True)
class RankTimes:
    """One rank's times of one head, an entry an iteration."""

    wall_us: tuple[float, ...]
    communication_us: tuple[float, ...]

    def as_json(self) -> dict[str, Any]:
        """The form that passes between ranks."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Sequence[float]]) -> RankTimes:
        """Read what `as_json` wrote."""
        return cls(tuple(value["wall_us"]), tuple(value["communication_us"]))


@dataclass(frozen=True)
class Latency:
    """What one head's step took over all ranks.

    Per iteration: the step takes as long as its slowest rank; `compute` is that of the rank that
    computes longest, and `communication` the rest. Waiting for a slower rank is thus neither. All
    are medians over iterations, so that compute and communication add up to the median only nearly.
    """

    median_us: float
    p10_us: float
    p90_us: float
    compute_us: float
    communication_us: float
    compute_us_by_rank: tuple[float, ...]
    num_iterations: int


def summarise(ranks: Sequence[RankTimes]) -> Latency:
    """Reduce the R ranks' times of the same N iterations.

    Raises:
        ValueError: no rank, no iteration, or ranks that differ in their number of iterations.
    """
    if not ranks or len({len(rank.wall_us) for rank in ranks}) != 1 or not ranks[0].wall_us:
        raise ValueError("every rank needs the same number of iterations, one or more")
    wall = np.array([rank.wall_us for rank in ranks])  # [R, N]
    compute = wall - np.array([rank.communication_us for rank in ranks])  # [R, N]
    slowest = wall.max(axis=0)
    longest_compute = compute.max(axis=0)
    p10, median, p90 = np.percentile(slowest, (10, 50, 90))
    return Latency(
        median_us=float(median),
        p10_us=float(p10),
        p90_us=float(p90),
        compute_us=float(np.median(longest_compute)),
        communication_us=float(np.median(slowest - longest_compute)),
        compute_us_by_rank=tuple(float(c) for c in np.median(compute, axis=1)),
        num_iterations=wall.shape[1],
    )


def time_interleaved(
    steps: Mapping[str, Step],
    num_iterations: int,
    *,
    meet: Callable[[], None],
    before_step: Callable[[], None] | None = None,
    on_iteration: Callable[[], None] | None = None,
) -> dict[str, RankTimes]:
    """Time `num_iterations` rounds of `steps` on this rank.

    Args:
        meet: waits for the other ranks of the group; called before each step.
        before_step: called before the meeting, untimed: flushes a cache.
        on_iteration: called after each round: progress.
    """
    names = list(steps)
    wall: dict[str, list[float]] = {name: [] for name in names}
    communication: dict[str, list[float]] = {name: [] for name in names}
    for iteration in range(num_iterations):
        first = iteration % len(names)
        for name in names[first:] + names[:first]:
            if before_step is not None:
                before_step()
            meet()
            wall_us, communication_us = steps[name](iteration)
            wall[name].append(wall_us)
            communication[name].append(communication_us)
        if on_iteration is not None:
            on_iteration()
    return {name: RankTimes(tuple(wall[name]), tuple(communication[name])) for name in names}


def forward_step(head: Head, batches: Sequence[Tensor]) -> Step:
    """A step of `head` on the iteration's batch `[B, D]`, the batches taken in turn."""
    tp: TensorParallel = head.tp
    compute = compute_step(head.forward, batches)

    def step(iteration: int) -> tuple[float, float]:
        tp.reset()
        wall_us, _ = compute(iteration)
        return wall_us, tp.communication_s * 1e6

    return step


def compute_step(work: Callable[[Tensor], object], batches: Sequence[Tensor]) -> Step:
    """A step of `work` on the iteration's batch; its communication is given as 0.

    On CUDA the wall is the time between two events around the step.
    """

    def step_on_cpu(iteration: int) -> tuple[float, float]:
        with annotate(STEP, iteration):
            start_s = time.perf_counter()
            work(batches[iteration % len(batches)])
            return (time.perf_counter() - start_s) * 1e6, 0.0

    def step_on_cuda(iteration: int) -> tuple[float, float]:
        start, stop = timing_event(), timing_event()
        with annotate(STEP, iteration):
            start.record()
            work(batches[iteration % len(batches)])
            stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) * 1e3, 0.0

    return step_on_cuda if batches[0].device.type == "cuda" else step_on_cpu


def timing_event() -> torch.cuda.Event:
    """A CUDA event that keeps its time."""
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def cache_flusher(device: torch.device) -> Callable[[], None] | None:
    """Return a function that empties the GPU's L2 cache; None on the CPU.

    A shard may be smaller than L2 and would be read from it at every step, which no decoder sees:
    between two steps of a head the model's body runs. On the CPU the interleaving does this, as the
    heads together exceed any cache.
    """
    if device.type != "cuda":
        return None
    l2_bytes = int(torch.cuda.get_device_properties(device).L2_cache_size)
    scratch = torch.empty(2 * l2_bytes, dtype=torch.uint8, device=device)

    def flush() -> None:
        scratch.zero_()
        torch.cuda.synchronize(device)

    return flush
