"""Time the collectives that heads use, bare, among the ranks of one level, for a fit.

Ranks meet before each collective, and it takes as long as its slowest rank, as a head's step does.
A message from rank to rank is half a round trip. On CUDA a burst of collectives is timed as
`timing.StreamClock` times a step; none of that has run on more than one GPU yet.

Letters: P ranks of the group.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashhead_dist.bench.control import Control
from flashhead_dist.bench.timing import step_clock
from flashhead_dist.parallel import Exchange, Operation, TensorParallel, round_trip
from flashhead_kernels.exchange_layout import DEFAULT_CAPACITY
from flashhead_topology.collective_cost import CollectiveOperation
from flashhead_topology.fit import Sample

_WARMUP = 3
_LEAST, _MOST = 5, 400
_BURST = 20
_KEY_BYTES = 8

Work = Callable[[], object]


@dataclass(frozen=True)
class Point:
    """One collective over one group, in seconds over iterations.

    payload_bytes: as nccl-tests defines `size`; of a send, the message.
    """

    operation: CollectiveOperation
    payload_bytes: int
    tp_size: int
    p10_s: float
    median_s: float
    p90_s: float
    num_iterations: int

    def sample(self, quantile: str) -> Sample:
        """What a fit takes; quantile: `p10` or `median`."""
        seconds = self.p10_s if quantile == "p10" else self.median_s
        return Sample(self.operation, self.payload_bytes, self.tp_size, seconds, _KEY_BYTES)

    def as_json(self) -> dict[str, Any]:
        """The form that passes between ranks and into files."""
        return asdict(self)


def message_sizes(largest_bytes: int) -> list[int]:
    """8 bytes and every eighth power up to `largest_bytes`, which is the last of them."""
    sizes = [8]
    while sizes[-1] * 8 < largest_bytes:
        sizes.append(sizes[-1] * 8)
    return [*sizes, largest_bytes] if largest_bytes > 8 else sizes


def time_collectives(
    place: TensorParallel, control: Control, sizes: Sequence[int], *, point_seconds: float
) -> list[Point]:
    """Time all-reduces of keys, all-gathers and sends of `sizes` bytes; the same on every rank.

    Where packed keys go through symmetric memory, that is timed as `one_shot`, up to what it
    takes, and no all-reduce is: give a place that was opened with `nccl` for those.

    point_seconds: about how long to repeat each.
    """
    return [
        _time(operation, num_bytes, place, control, work, point_seconds)
        for operation, num_bytes, work in _works(place, sizes)
    ]


def _works(
    place: TensorParallel, sizes: Sequence[int]
) -> Iterator[tuple[CollectiveOperation, int, Work]]:
    one_shot = place.exchange_method == "symmetric"
    for size in sizes:
        keys = torch.zeros(max(1, size // _KEY_BYTES), dtype=torch.int64, device=place.device)
        if not one_shot:
            yield "all_reduce", keys.nbytes, _exchange(place, Operation.MAX, keys)
        elif keys.numel() <= DEFAULT_CAPACITY:
            yield "one_shot", keys.nbytes, _exchange(place, Operation.MAX, keys)
        if one_shot:
            continue
        part = torch.zeros(max(1, size // place.tp_size), dtype=torch.uint8, device=place.device)
        yield "all_gather", part.nbytes * place.tp_size, _exchange(place, Operation.GATHER, part)
        message = torch.zeros(size, dtype=torch.uint8, device=place.device)
        yield "send_recv", size, _trip(place, message)


def time_pairs(place: TensorParallel, control: Control) -> dict[tuple[int, int], float]:
    """Least of some round trips of 8 bytes between every two ranks of the group, in seconds.

    Every rank calls it and has the same answer; pairs are timed one after the other.
    """
    mine: dict[str, float] = {}
    group = place.group
    assert group is not None
    message = torch.zeros(1, dtype=torch.int64, device=place.device)
    pairs = [(a, b) for b in range(place.tp_size) for a in range(b)]
    for pair in pairs:
        place.barrier()
        if place.tp_rank in pair:
            peer = sum(pair) - place.tp_rank
            begins = place.tp_rank == pair[0]
            trips = []
            for _ in range(_WARMUP + _LEAST):
                start_s = time.perf_counter()
                round_trip(message, peer, group, begins=begins)
                if message.is_cuda:
                    torch.cuda.synchronize(message.device)
                trips.append(time.perf_counter() - start_s)
            if begins:
                mine[f"{pair[0]},{pair[1]}"] = min(trips)
    found: dict[str, float] = {}
    for part in control.gather(mine):
        found |= part
    return {(a, b): found[f"{a},{b}"] for a, b in pairs}


def _exchange(place: TensorParallel, operation: Operation, tensor: Tensor) -> Work:
    return lambda: place.perform(Exchange(operation, tensor))


def _trip(place: TensorParallel, message: Tensor) -> Work:
    group, rank = place.group, place.tp_rank
    assert group is not None
    if rank > 1:
        return lambda: None
    return lambda: round_trip(message, 1 - rank, group, begins=rank == 0)


def _time(
    operation: CollectiveOperation,
    num_bytes: int,
    place: TensorParallel,
    control: Control,
    work: Work,
    point_seconds: float,
) -> Point:
    clock = step_clock(place.device, place)
    burst = _BURST if place.device.type == "cuda" else 1

    def run() -> None:
        for _ in range(burst):
            work()

    def repeat(number: int) -> list[float]:
        return [clock.time_us(run) * 1e-6 / burst for _ in range(number)]

    estimates = control.gather(min(repeat(_WARMUP)))
    number = max(_LEAST, min(_MOST, int(point_seconds / max(*estimates, 1e-6))))
    slowest = np.max(np.array(control.gather(repeat(number))), axis=0)  # [number]
    if operation == "send_recv":
        slowest = slowest / 2
    p10, median, p90 = (float(value) for value in np.percentile(slowest, (10, 50, 90)))
    return Point(operation, num_bytes, place.tp_size, p10, median, p90, number)


def launch_seconds(device: torch.device) -> float:
    """What the smallest kernel takes beside its work: the least of some bursts of additions."""
    number = torch.zeros(1, dtype=torch.float32, device=device)

    def burst() -> float:
        start_s = time.perf_counter()
        for _ in range(1000):
            number.add_(1)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - start_s) / 1000

    return min(burst() for _ in range(5))
