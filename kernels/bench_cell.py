"""One cell of `bench.py`: every way, checked and then timed, interleaved, over rotated weights.

A way that fails, or gives a wrong token, is left out of its cell and told in `Bench.failures`.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench_shapes import Shape, make_shard, rotation_count
from bench_ways import (
    FLASHHEAD,
    Checked,
    Copy,
    Published,
    Way,
    WrongResultError,
    make_ways,
    read_bytes,
)
from flashhead_kernels.timing import Clock, Run, time_steps

_UNCHECKED = Checked(0, 0)


@dataclass(frozen=True)
class Measurement:
    """A way in a cell. Times are of one step; `synthetic` weights are random values.

    timing: what timed it, and whether its launches are part. num_copies: of the weights, taken in
    turn. read_bytes: that a step must read, each once. share_of_copy: of the copy bandwidth.
    times_flashhead: its median over that of `flashhead` in the same cell, None where that failed.
    num_checked, num_ties: tokens compared with the definition's, and those that tie with another.
    """

    device: str
    model: str
    synthetic: bool
    vocab_size: int
    hidden_size: int
    tp_size: int
    batch_size: int
    way: str
    timing: str
    median_us: float
    p10_us: float
    p90_us: float
    num_iterations: int
    steps_per_iteration: int
    num_copies: int
    read_bytes: float
    gb_per_s: float
    copy_gb_per_s: float
    share_of_copy: float
    times_flashhead: float | None
    num_checked: int
    num_ties: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


_CUDA_COPY_BYTES = 1 << 30
_CPU_COPY_BYTES = 64 << 20
_SIMULATED_COPY_BYTES = 1 << 16
_COPIES_TIMED = 20


@dataclass(frozen=True)
class Bench:
    """What all cells share. notes: filled with what could not be measured, and why.

    failures: filled with the ways that failed or gave a wrong token, and where. least_steps: a run
    holds this many steps or more, so that what starts a graph is a small part of each.
    """

    device_name: str
    clock: Clock
    ops: ModuleType
    iterations: int
    seed: int
    notes: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    least_steps: int = 8
    warm_up_rounds: int = 3


@dataclass(frozen=True)
class _Prepared:
    way: Way
    run: Run
    results: list[Tensor]
    timing: str
    checked: Checked


def measure_shard(
    bench: Bench,
    shape: Shape,
    tp_size: int,
    batch_sizes: Sequence[int],
    on_cell: Callable[[], None],
) -> Iterator[Measurement]:
    """Measure one rank of `tp_size` at each batch size."""
    copy_bandwidth = copy_gb_per_s(bench.clock)
    copies = _make_copies(bench, shape, tp_size)
    for batch_size in batch_sizes:
        states = _make_states(bench, shape, len(copies), batch_size)
        prepared = []
        for way in make_ways(bench.ops, graphs=bench.clock.graphs):
            where = f"{way.name} at {shape.name}, tp {tp_size}, batch {batch_size}"
            ready = _checked(bench, way, copies, states, where)
            if ready is not None:
                prepared.append(ready)
        num_steps = _num_steps(bench, len(copies))
        times = _time(bench, prepared, num_steps)
        flashhead_us = float(np.median(times[FLASHHEAD])) if FLASHHEAD in times else None
        for ready in prepared:
            p10, median, p90 = (
                float(q) for q in np.percentile(times[ready.way.name], (10, 50, 90))
            )
            num_bytes = read_bytes(ready.way.name, copies[0], states)
            rate = gb_per_s(num_bytes, median)
            yield Measurement(
                device=bench.device_name,
                model=shape.name,
                synthetic=True,
                vocab_size=shape.vocab_size,
                hidden_size=shape.hidden_size,
                tp_size=tp_size,
                batch_size=batch_size,
                way=ready.way.name,
                timing=ready.timing,
                median_us=median,
                p10_us=p10,
                p90_us=p90,
                num_iterations=bench.iterations,
                steps_per_iteration=num_steps,
                num_copies=len(copies),
                read_bytes=num_bytes,
                gb_per_s=rate,
                copy_gb_per_s=copy_bandwidth,
                share_of_copy=rate / copy_bandwidth,
                times_flashhead=median / flashhead_us if flashhead_us else None,
                num_checked=ready.checked.tokens,
                num_ties=ready.checked.ties,
            )
        on_cell()


def _make_copies(bench: Bench, shape: Shape, tp_size: int) -> list[Copy]:
    """As many copies as the way that reads least needs, at batch 1."""
    shard = make_shard(shape, tp_size, bench.clock.device, bench.seed)
    probed = shard.spread.shape[0] * shard.probes_per_group
    least = min(shard.flashhead_bytes(probed, 1), shard.dense_bytes(1))
    count = rotation_count(least, bench.clock.cache_bytes)
    shards = [shard, *(shard.clone() for _ in range(count - 1))]
    return [Copy(one, Published.over(one)) for one in shards]


def _make_states(bench: Bench, shape: Shape, count: int, batch_size: int) -> Tensor:
    """Random hidden states `[count, B, D]`, others for each copy."""
    device = bench.clock.device
    generator = torch.Generator(device).manual_seed(bench.seed + 1)
    size = (count, batch_size, shape.hidden_size)
    return torch.randn(size, generator=generator, device=device, dtype=torch.bfloat16)


def _num_steps(bench: Bench, num_copies: int) -> int:
    return num_copies * -(-bench.least_steps // num_copies)


def _prepare(bench: Bench, way: Way, copies: Sequence[Copy], states: Tensor) -> _Prepared | None:
    """The way's steps over all copies in turn; None where torch cannot capture one not required."""
    clock, count = bench.clock, len(copies)
    steps = [
        partial(way.step, copies[i % count], states[i % count])
        for i in range(_num_steps(bench, count))
    ]
    if not (way.graph and clock.graphs):
        timing = f"{clock.label}, launches included" if clock.graphs else clock.label
        return _Prepared(way, *_keep_results(steps), timing, _UNCHECKED)
    try:
        return _Prepared(way, *clock.capture(steps), f"{clock.label}, graph replay", _UNCHECKED)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if way.required:
            raise
        note = f"{way.name} is left out where a CUDA graph cannot hold it: {_first_line(error)}"
        if note not in bench.notes:
            bench.notes.append(note)
        return None


def _checked(
    bench: Bench, way: Way, copies: Sequence[Copy], states: Tensor, where: str
) -> _Prepared | None:
    """The way, run once as it will be timed, right on the first and on the last copy.

    None where it cannot be captured, or failed: other ways are measured all the same.
    """
    try:
        ready = _prepare(bench, way, copies, states)
        if ready is None:
            return None
        ready.run()
        if states.device.type == "cuda":
            torch.cuda.synchronize(states.device)
        both = [
            way.check(copies[place], states[place], ready.results[place])
            for place in (0, len(copies) - 1)
        ]
    except torch.OutOfMemoryError:
        raise
    except WrongResultError as error:
        bench.failures.append(f"{where}: {error}")
        return None
    except Exception as error:
        traceback.print_exc()
        bench.failures.append(f"{where}: {_first_line(error)}")
        return None
    total = Checked(sum(one.tokens for one in both), sum(one.ties for one in both))
    return replace(ready, checked=total)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _time(bench: Bench, prepared: Sequence[_Prepared], num_steps: int) -> dict[str, list[float]]:
    """Microseconds a step by way."""

    def timed(ready: _Prepared) -> Callable[[int], float]:
        launches = not ready.way.graph
        return lambda number: bench.clock.time_us(ready.run, launches=launches) / num_steps

    steps = {ready.way.name: timed(ready) for ready in prepared}
    time_steps(steps, bench.warm_up_rounds)
    return time_steps(steps, bench.iterations)


def _keep_results(steps: Sequence[Callable[[], Tensor]]) -> tuple[Run, list[Tensor]]:
    """Steps one after the other: what runs them, and the list that a run fills anew."""
    results: list[Tensor] = []

    def run() -> None:
        results.clear()
        results.extend(step() for step in steps)

    return run, results


def copy_gb_per_s(clock: Clock) -> float:
    """Bandwidth of a copy from the device's memory to itself, bytes read plus bytes written."""
    num_bytes = _CUDA_COPY_BYTES if clock.graphs else _CPU_COPY_BYTES
    num_bytes = _SIMULATED_COPY_BYTES if clock.simulated else num_bytes
    source = torch.empty(num_bytes, dtype=torch.uint8, device=clock.device).random_()
    target = torch.empty_like(source)
    times = [clock.time_us(lambda: target.copy_(source)) for _ in range(3 + _COPIES_TIMED)][3:]
    return gb_per_s(2 * num_bytes, float(np.median(times)))


def gb_per_s(num_bytes: float, microseconds: float) -> float:
    """Decimal gigabytes a second."""
    return num_bytes / microseconds / 1e3
