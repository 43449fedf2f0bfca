"""What exchanges cost: timed bare, fitted, and projected to a `tp_size` that cannot run here.

`time_exchange_costs` and `projected_communication_us` serve the sweep. gloo's ring takes steps in
turn: `2 (P - 1)` for an all-reduce, `P - 1` for an all-gather. The model is `microseconds = steps *
per_step + sent bytes * per_byte` per operation; its two constants come from exchanges of two sizes
timed in the same run at the largest `tp_size` that is not oversubscribed. So it assumes ranks that
are linked as those were, with a core each, and that a step costs the same at any `tp_size`.

`time_collectives`, `time_pairs` and `calibrated_system` serve launch/calibrate.py. Ranks meet
before each collective, and it takes as long as its slowest rank, as a head's step does. A message
from rank to rank is half a round trip. On CUDA a burst of collectives is timed on the stream; none
of that has run on more than one GPU yet.

Letters: P ranks of the group.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashhead_dist.bench.control import Control
from flashhead_dist.bench.environment import Setup
from flashhead_dist.bench.timer import step_clock
from flashhead_dist.parallel import (
    Exchange,
    Operation,
    TensorParallel,
    round_trip,
)
from flashhead_kernels.keys import DEFAULT_CAPACITY
from flashhead_topology.links import CollectiveOperation, Fit, Sample, ring_sent_bytes
from flashhead_topology.systems import Level, Source, System

_SMALL_BYTES, _LARGE_BYTES = 8, 1 << 20
_EXCHANGE_WARMUP, _EXCHANGE_ITERATIONS = 10, 60
_WARMUP = 3
_LEAST, _MOST = 5, 400
_BURST = 20
_KEY_BYTES = 8

Work = Callable[[], object]


@dataclass(frozen=True)
class ExchangeCost:
    """Constants of one operation, and where they were measured."""

    us_per_step: float
    us_per_byte: float
    fitted_at_tp_size: int

    def microseconds(self, operation: Operation, operand_bytes: int, tp_size: int) -> float:
        """Cost of one exchange; 0 at `tp_size` 1, where there is none."""
        if tp_size == 1:
            return 0.0
        sent = ring_sent_bytes(operation, operand_bytes, tp_size)
        return ring_steps(operation, tp_size) * self.us_per_step + sent * self.us_per_byte


def ring_steps(operation: Operation, tp_size: int) -> int:
    """Steps of gloo's ring, one after the other."""
    return (tp_size - 1) * (1 if operation is Operation.GATHER else 2)


def fit_exchange_cost(
    operation: Operation, tp_size: int, small: tuple[int, float], large: tuple[int, float]
) -> ExchangeCost:
    """Fit the two constants to two timed exchanges `(operand bytes, microseconds)`.

    The small one fixes the cost of a step, the large one that of a byte; neither is below 0.

    Raises:
        ValueError: the exchanges are not of two sizes, or there is only one rank.
    """
    (small_bytes, small_us), (large_bytes, large_us) = small, large
    if tp_size < 2 or large_bytes <= small_bytes:
        raise ValueError("a fit needs two or more ranks and two sizes, the smaller one first")
    small_sent, large_sent = (
        ring_sent_bytes(operation, size, tp_size) for size in (small_bytes, large_bytes)
    )
    us_per_byte = max(0.0, (large_us - small_us) / (large_sent - small_sent))
    us_per_step = max(0.0, small_us - small_sent * us_per_byte) / ring_steps(operation, tp_size)
    return ExchangeCost(us_per_step, us_per_byte, tp_size)


def projected_communication_us(
    exchanges: Iterable[tuple[Operation, int]],
    tp_size: int,
    costs: Mapping[Operation, ExchangeCost],
) -> float:
    """Sum over one step's exchanges `(operation, operand bytes of a rank)`."""
    return sum(
        costs[operation].microseconds(operation, num_bytes, tp_size)
        for operation, num_bytes in exchanges
    )


def time_exchange_costs(place: TensorParallel, control: Control) -> dict[Operation, ExchangeCost]:
    """Time every operation at two sizes and fit its cost; every rank of the group calls it.

    Empty on CUDA. The model is of gloo's ring; there the keys of a small batch go through symmetric
    memory and more of them through a library, so that one line through both sizes would be that of
    neither, and the host's clock sees only launches.
    """
    if place.device.type == "cuda":
        return {}
    costs: dict[Operation, ExchangeCost] = {}
    for operation in Operation:
        dtype = torch.int64 if operation is Operation.MAX else torch.float32
        small, large = (
            (size, _median_us(place, control, operation, _operand(size, dtype, place)))
            for size in (_SMALL_BYTES, _LARGE_BYTES)
        )
        costs[operation] = fit_exchange_cost(operation, place.tp_size, small, large)
    return costs


def _operand(num_bytes: int, dtype: torch.dtype, place: TensorParallel) -> Tensor:
    return torch.zeros(num_bytes // dtype.itemsize, dtype=dtype, device=place.device)


def _median_us(
    place: TensorParallel, control: Control, operation: Operation, operand: Tensor
) -> float:
    """Median over iterations of the slowest rank's time."""
    clock = step_clock(place.device, place)
    work = partial(place.perform, Exchange(operation, operand))
    times_us = [clock.time_us(work) for _ in range(_EXCHANGE_WARMUP + _EXCHANGE_ITERATIONS)]
    ranks = control.gather(times_us[_EXCHANGE_WARMUP:])
    return float(np.median(np.max(ranks, axis=0)))


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


def calibrated_system(
    setup: Setup,
    fits: Sequence[Fit],
    memory: tuple[float, str, float],
    *,
    name: str,
    algorithm: str | None,
    ranks: int,
    made: str,
) -> System:
    """The machine as the cost model knows it, every figure with its source.

    Args:
        fits: of its levels, innermost first.
        memory: bytes a second of one rank, how that was measured, seconds of a launch.
        algorithm: of its collectives; see `System`.
        ranks: that the outermost level joins.
        made: by what command, on what and when.

    Raises:
        ValueError: a name that cannot be one.
    """
    bytes_per_s, method, launch_s = memory
    levels = [_with_sources(fit, made) for fit in fits]
    levels[-1] = replace(levels[-1], ranks=ranks)
    return System(
        name=name,
        device=setup.device_name,
        device_type="cuda" if setup.device.type == "cuda" else "cpu",
        description=f"Calibrated by {made}.",
        memory_bandwidth_bytes_per_s=bytes_per_s,
        launch_s=launch_s,
        levels=tuple(levels),
        algorithm=algorithm,
        sources={
            "memory_bandwidth_bytes_per_s": Source("measured", made, method),
            "launch_s": Source("measured", made, "the least of bursts of one-element additions"),
        },
    )


def _with_sources(fit: Fit, made: str) -> Level:
    note = f"one fit of all constants to {len(fit.residuals)} collectives"
    source = Source("measured", made, note, round(fit.mean_relative_error(), 4))
    figures = ["alpha_s", "beta_s_per_byte", "base_s"]
    if fit.level.one_shot_alpha_s is not None:
        figures.append("one_shot_alpha_s")
    return replace(fit.level, sources=dict.fromkeys(figures, source))
