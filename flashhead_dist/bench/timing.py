"""Time steps of several heads, interleaved, and reduce the ranks' times to one latency.

A step is one `forward` on every rank of the group. In every round each head takes one step, in an
order that rotates, so that a drift of the machine falls on all alike and no head always follows the
same one. A clock (`HostClock`, `StreamClock`) has the ranks meet before each step. What they differ
by when they leave the meeting is part of the step, so a latency is an upper bound by that skew.

Letters: R ranks of the group, N iterations.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from flashhead_dist.heads.base import Head
from flashhead_dist.parallel import TensorParallel, meet_on_stream
from flashhead_profiles.ranges import STEP, annotate

Step = Callable[[int], tuple[float, float]]
"""Takes the iteration's number, returns (wall, communication) in microseconds on this rank."""

_READS = 16
_SMALLEST_SCRATCH_BYTES = 64 << 20


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


class Clock(Protocol):
    """Times one piece of work on this rank, from the moment at which all ranks of a group begin."""

    def ready(self) -> None:
        """Meet the other ranks, with a cold cache where the clock sees to that."""

    def time_us(self, work: Callable[[], object]) -> float:
        """Be ready, run `work`, and return the microseconds that it took."""


class HostClock:
    """The host's clock, for a CPU, whose work has ended when a call returns.

    meet: waits for the other ranks. Caches are as the work before left them: heads interleaved
    exceed any cache together.
    """

    def __init__(self, meet: Callable[[], None] = lambda: None) -> None:
        self._meet = meet

    def ready(self) -> None:
        self._meet()

    def time_us(self, work: Callable[[], object]) -> float:
        self.ready()
        start_s = time.perf_counter()
        work()
        return (time.perf_counter() - start_s) * 1e6


class StreamClock:
    """Two events on a GPU's current stream, around work that the host queued ahead of the GPU.

    The host queues reads, the meeting, the start event, the work and the stop event, and waits for
    nothing until then. Each part has its reason:

    1. The GPU reads a buffer of twice its L2 or more, over and over. A shard may be smaller than L2
       and would be read from it at every step, which no decoder sees: the model's body runs between
       two steps of a head. The buffer is read and not written, since L2 would write a dirty line
       back to memory within the work that evicts it.
    2. All reads together keep the GPU busy for some hundreds of microseconds (by their bytes 330 on
       an H200), in which the host queues the rest. An event recorded on an idle GPU has its time
       before the host has launched anything, and the launches are then part of the figure.
    3. The ranks meet on the stream, in an all-reduce of one number before the start event. Ranks
       that leave a host's barrier still have to launch their work, and differ by as much as their
       hosts do. Without NCCL only the host can meet, and does so before the reads.

    The launches of a step from Python (no graph) are hidden too, while the host keeps ahead of the
    GPU. Where the host takes longer to launch the step than the GPU takes for reads and step, or
    waits for the GPU in the middle of the step, the GPU is idle between kernels. These gaps are
    part of the time: an eager decoder has them too.
    """

    def __init__(self, device: torch.device, tp: TensorParallel | None = None) -> None:
        """tp: the group whose ranks meet, all of which time the same; None for a rank alone."""
        self._device = device
        several = tp if tp is not None and tp.tp_size > 1 else None
        self._tp_on_stream = several if several and meets_on_stream(several) else None
        self._tp_on_host = None if self._tp_on_stream else several
        l2_bytes = int(torch.cuda.get_device_properties(device).L2_cache_size)
        scratch_bytes = max(2 * l2_bytes, _SMALLEST_SCRATCH_BYTES)
        self._scratch = torch.zeros(scratch_bytes // 4, dtype=torch.float32, device=device)
        self._sink = torch.zeros((), dtype=torch.float32, device=device)
        self._token = torch.zeros(1, dtype=torch.float32, device=device)

    def ready(self) -> None:
        """Queue the reads and the meeting."""
        if self._tp_on_host is not None:
            self._tp_on_host.barrier()
        for _ in range(_READS):
            torch.sum(self._scratch, dim=0, out=self._sink)
        if self._tp_on_stream is not None:
            meet_on_stream(self._token, self._tp_on_stream.group)

    def time_us(self, work: Callable[[], object]) -> float:
        stream = torch.cuda.current_stream(self._device)
        start, stop = _timing_event(), _timing_event()
        self.ready()
        start.record(stream)
        work()
        stop.record(stream)
        stop.synchronize()
        return float(start.elapsed_time(stop)) * 1e3


def step_clock(device: torch.device, tp: TensorParallel | None = None) -> Clock:
    """The clock of a device. tp: the group whose ranks meet before each piece of work, if any."""
    if device.type == "cuda":
        return StreamClock(device, tp)
    return HostClock() if tp is None else HostClock(tp.barrier)


def meets_on_stream(tp: TensorParallel) -> bool:
    """Whether collectives of the group are queued on the GPU's stream, without the host."""
    return tp.tp_size == 1 or dist.get_backend(tp.group) == "nccl"


def time_interleaved(steps: Mapping[str, Step], num_iterations: int) -> dict[str, RankTimes]:
    """Time `num_iterations` rounds of `steps` on this rank."""
    names = list(steps)
    wall: dict[str, list[float]] = {name: [] for name in names}
    communication: dict[str, list[float]] = {name: [] for name in names}
    for iteration in range(num_iterations):
        first = iteration % len(names)
        for name in names[first:] + names[:first]:
            wall_us, communication_us = steps[name](iteration)
            wall[name].append(wall_us)
            communication[name].append(communication_us)
    return {name: RankTimes(tuple(wall[name]), tuple(communication[name])) for name in names}


def forward_step(head: Head, batches: Sequence[Tensor], clock: Clock) -> Step:
    """A step of `head` on the iteration's batch `[B, D]`, the batches taken in turn."""
    tp: TensorParallel = head.tp
    compute = compute_step(head.forward, batches, clock)

    def step(iteration: int) -> tuple[float, float]:
        tp.reset()
        wall_us, _ = compute(iteration)
        return wall_us, tp.communication_s * 1e6

    return step


def compute_step(work: Callable[[Tensor], object], batches: Sequence[Tensor], clock: Clock) -> Step:
    """A step of `work` on the iteration's batch; its communication is given as 0."""

    def step(iteration: int) -> tuple[float, float]:
        batch = batches[iteration % len(batches)]
        return clock.time_us(in_step_range(partial(work, batch), iteration)), 0.0

    return step


def in_step_range(work: Callable[[], object], iteration: int) -> Callable[[], None]:
    """`work` within the range that profiles know a step by, without what a clock does before."""

    def run() -> None:
        with annotate(STEP, iteration):
            work()

    return run


def _timing_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
