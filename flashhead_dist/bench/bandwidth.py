"""How fast the ranks of a group read memory: what a head's time is set against.

Every rank reads a buffer of its own that no cache holds, all at the same moment where they run at
the same moment, so ranks that share a memory bus share it here as they do in a step.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flashhead_dist.bench.control import Control
from flashhead_dist.bench.timing import Clock, step_clock
from flashhead_dist.parallel import TensorParallel
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
    times_us: list[float] = []
    if in_turn:
        for turn in control.ranks:
            control.barrier()
            if turn == control.rank:
                times_us = _read_times_us(place.device, step_clock(place.device))
        control.barrier()
    else:
        times_us = _read_times_us(place.device, step_clock(place.device, place))
    median_s = float(np.median(times_us[_WARM_UPS:])) * 1e-6
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


def _read_times_us(device: torch.device, clock: Clock) -> list[float]:
    numbers = _numbers(device)
    return [clock.time_us(numbers.sum) for _ in range(_WARM_UPS + _READS)]


def _numbers(device: torch.device) -> Tensor:
    if device.type == "cuda":
        return torch.ones(_CUDA_BYTES // 4, dtype=torch.float32, device=device)
    return empty_on_large_pages((_CPU_BYTES // 4,), torch.float32).fill_(1)
