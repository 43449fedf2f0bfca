"""How fast the ranks of a group read memory: what a head's time is set against.

Every rank reads a buffer of its own that no cache holds, all at the same moment where they run at
the same moment, so ranks that share a memory bus share it here as they do in a step.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from flashhead_dist.collectives import TensorParallel
from flashhead_dist.measure.control import Control
from flashhead_dist.measure.timing import timing_event
from flashhead_kernels.cpu_memory import empty_on_large_pages

_CPU_BYTES = 128 << 20
_CUDA_BYTES = 1 << 30
_WARM_UPS = 2
_READS = 12


@dataclass(frozen=True)
class MemoryBandwidth:
    """Bytes a second that each rank read, in rank order; `method` says how."""

    bytes_per_s_by_rank: tuple[float, ...]
    method: str


def measure_bandwidth(place: TensorParallel, control: Control, *, in_turn: bool) -> MemoryBandwidth:
    """Measure the group's ranks; every rank of it calls this.

    in_turn: one rank at a time, as oversubscribed ranks are measured.
    """
    times_s: list[float] = []
    if in_turn:
        for turn in control.ranks:
            control.barrier()
            if turn == control.rank:
                read_s = _reader(place.device)
                times_s = [read_s() for _ in range(_WARM_UPS + _READS)]
                del read_s
        control.barrier()
    else:
        read_s = _reader(place.device)
        for _ in range(_WARM_UPS + _READS):
            place.barrier()
            times_s.append(read_s())
    median_s = float(np.median(times_s[_WARM_UPS:]))
    num_bytes = _CUDA_BYTES if place.device.type == "cuda" else _CPU_BYTES
    rates = control.gather(num_bytes / median_s)
    when = "one rank at a time" if in_turn else "all ranks at once"
    return MemoryBandwidth(
        tuple(float(rate) for rate in rates),
        f"a buffer of {num_bytes >> 20} MiB a rank summed with the rank's own threads, {when}, "
        f"median of {_READS}",
    )


def roofline_share(num_bytes: int, compute_us: float, bytes_per_s: float) -> float:
    """The share of the memory's rate at which a rank read `num_bytes` in its compute.

    Above 1 where what it reads partly lies in a cache.
    """
    return num_bytes / (compute_us * 1e-6) / bytes_per_s


def _reader(device: torch.device) -> Callable[[], float]:
    """A function that reads the buffer once and returns the seconds it took."""
    if device.type == "cuda":
        numbers = torch.ones(_CUDA_BYTES // 4, device=device)

        def read_on_cuda() -> float:
            start, stop = timing_event(), timing_event()
            start.record()
            numbers.sum()
            stop.record()
            stop.synchronize()
            return float(start.elapsed_time(stop)) / 1e3

        return read_on_cuda
    words = empty_on_large_pages((_CPU_BYTES // 4,), torch.float32).fill_(1)

    def read_on_cpu() -> float:
        start_s = time.perf_counter()
        words.sum()
        return time.perf_counter() - start_s

    return read_on_cpu
