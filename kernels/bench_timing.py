"""Clocks for `bench.py`: CUDA events around graph replays, or the wall clock on a CPU.

Both have the same members, so that a CPU runs the very code that a GPU does, but for them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

Step = Callable[[], Tensor]
Run = Callable[[], None]

_SMALLEST_SCRATCH_BYTES = 256 << 20
"""Reading this much keeps a GPU busy while the host queues what is timed: some 50 us."""
_CUDA_COPY_BYTES = 1 << 30
_CPU_COPY_BYTES = 64 << 20
_SIMULATED_BYTES = 1 << 16
_COPIES_TIMED = 20


class Clock(Protocol):
    """device; cache_bytes: of the last-level cache that weights rotate past, 0 for none.

    copy_bytes: that a copy moves, of which the bandwidth is taken.
    """

    device: torch.device
    graphs: bool
    cache_bytes: int
    copy_bytes: int
    label: str

    def capture(self, steps: Sequence[Step]) -> tuple[Run, list[Tensor]]:
        """Steps as one CUDA graph: what replays it, and the tensors that a replay leaves."""

    def time_us(self, run: Run, *, launches: bool) -> float:
        """Microseconds that `run` takes; `launches`: those of the host's launches are part."""


class WallClock:
    """A CPU: no graphs, and caches are as the steps before left them."""

    graphs = False
    cache_bytes = 0
    copy_bytes = _CPU_COPY_BYTES
    label = "wall clock"

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def capture(self, steps: Sequence[Step]) -> tuple[Run, list[Tensor]]:
        raise NotImplementedError("a CPU has no graphs")

    def time_us(self, run: Run, *, launches: bool) -> float:
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e6


class CudaClock:
    """Events on one stream, on which all is warmed up, captured and replayed.

    simulated: the device is a stand-in, and buffers need no size.
    """

    graphs = True
    label = "CUDA events"

    def __init__(self, device: torch.device, *, simulated: bool = False) -> None:
        self.device = device
        l2_bytes = int(torch.cuda.get_device_properties(device).L2_cache_size)
        self.cache_bytes = 0 if simulated else l2_bytes
        # Kernels keep a workspace a stream: one filled while capturing would never be filled.
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.copy_bytes = _SIMULATED_BYTES if simulated else _CUDA_COPY_BYTES
        scratch_bytes = max(4 * self.cache_bytes, _SMALLEST_SCRATCH_BYTES)
        if simulated:
            scratch_bytes = _SIMULATED_BYTES
        self._scratch = torch.zeros(scratch_bytes // 4, device=device)
        self._sink = torch.empty((), device=device)

    def capture(self, steps: Sequence[Step]) -> tuple[Run, list[Tensor]]:
        self._warm_up(steps)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            results = [step() for step in steps]
        return graph.replay, results

    def time_us(self, run: Run, *, launches: bool) -> float:
        """Between two events around `run`, after everything else has left the cache.

        What went before is read, not written, so that no write-back falls into the timed part.
        Where launches are not part, the host queues `run` while the GPU is still reading.
        """
        start, stop = _timing_event(), _timing_event()
        with torch.cuda.stream(self.stream):
            torch.sum(self._scratch, dim=0, out=self._sink)
            if launches:
                self.stream.synchronize()
            start.record()
            run()
            stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop)) * 1e3

    def _warm_up(self, steps: Sequence[Step]) -> None:
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            for step in steps:
                step()
        self.stream.synchronize()


def make_clock(device: torch.device) -> Clock:
    """The clock of a device."""
    return CudaClock(device) if device.type == "cuda" else WallClock()


def keep_results(steps: Sequence[Step]) -> tuple[Run, list[Tensor]]:
    """Steps one after the other: what runs them, and the list that a run fills anew."""
    results: list[Tensor] = []

    def run() -> None:
        results.clear()
        results.extend(step() for step in steps)

    return run, results


def copy_gb_per_s(clock: Clock) -> float:
    """Bandwidth of a copy from the device's memory to itself, bytes read plus bytes written."""
    source = torch.empty(clock.copy_bytes, dtype=torch.uint8, device=clock.device).random_()
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)

    times = [clock.time_us(copy, launches=False) for _ in range(3 + _COPIES_TIMED)][3:]
    return gb_per_s(2 * clock.copy_bytes, statistics.median(times))


def gb_per_s(num_bytes: float, microseconds: float) -> float:
    """Decimal gigabytes a second."""
    return num_bytes / microseconds / 1e3


def _timing_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
