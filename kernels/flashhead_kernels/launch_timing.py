"""Time ways to launch the same work against each other on a GPU."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

Run = Callable[[], object]

_WARM_UPS = 3
_ROUNDS = 15
_READS = 16
_SMALLEST_SCRATCH_BYTES = 64 << 20


class LaunchClock(Protocol):
    """Times one run of a way."""

    def time_us(self, run: Run) -> float:
        """Microseconds that the device takes for `run`, beginning with a cold cache."""


def interleaved_medians_us(ways: Sequence[Run], clock: LaunchClock) -> list[float]:
    """Median of each way; in every round each runs once, in an order that rotates.

    `triton.testing.do_bench` times one way after another, so that a clock that changes between
    them falls on one, and its launches are part where the device outruns the host.
    """
    times: list[list[float]] = [[] for _ in ways]
    for turn in range(-_WARM_UPS, _ROUNDS):
        first = turn % len(ways)
        for place in (*range(first, len(ways)), *range(first)):
            elapsed = clock.time_us(ways[place])
            if turn >= 0:
                times[place].append(elapsed)
    return [statistics.median(way) for way in times]


class CudaLaunchClock:
    """Events on the current stream of `device`, around work that the host queued ahead of time.

    Before each run a buffer of twice the L2 is read over and over: the run finds none of its
    weights in the cache and no write-back under way, and the host has queued it before the device
    comes to it, as a CUDA graph would have.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        l2_bytes = int(torch.cuda.get_device_properties(device).L2_cache_size)
        scratch_bytes = max(2 * l2_bytes, _SMALLEST_SCRATCH_BYTES)
        self._scratch = torch.zeros(scratch_bytes // 4, device=device)
        self._sink = torch.empty((), device=device)

    def time_us(self, run: Run) -> float:
        with torch.cuda.device(self._device):
            start, stop = _timing_event(), _timing_event()
            for _ in range(_READS):
                torch.sum(self._scratch, dim=0, out=self._sink)
            start.record()
            run()
            stop.record()
            stop.synchronize()
        return float(start.elapsed_time(stop)) * 1e3


def _timing_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
