"""Peak memory of a piece of work, and how fast the ranks of a group read memory.

A peak is resident memory of the process, or CUDA memory of its device.

On CUDA it is that of torch's allocator, which kernels take their workspaces from too.

The resident peak is the kernel's high-water mark (VmHWM), reset before the work, less the resident
memory at that point. It counts pages of mapped checkpoint files while they are mapped.

For the bandwidth every rank reads a buffer of its own that no cache holds, all at the same moment
where they run at the same moment, so ranks that share a memory bus share it here as in a step.
"""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flashhead_dist.bench.control import Control
from flashhead_dist.bench.timer import step_clock
from flashhead_dist.parallel import TensorParallel
from flashhead_kernels.cpu_threads import empty_on_large_pages
from flashhead_kernels.timing import Clock

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"


@dataclass(frozen=True)
class Peak:
    """Bytes above what was held before; None with a reason where the kernel does not say."""

    peak_bytes: int | None
    reason: str | None = None


class PeakMemory:
    """Measures from construction on; `read` may be called more than once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._reason: str | None = None
        release_memory(device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            self._start_bytes = torch.cuda.memory_allocated(device)
            return
        try:
            _CLEAR_REFS.write_text(_RESET_PEAK)
            self._start_bytes = _status_bytes("VmRSS")
        except OSError as error:
            self._reason = f"the kernel's peak cannot be reset: {error}"

    def read(self) -> Peak:
        """The peak so far."""
        if self._reason is not None:
            return Peak(None, self._reason)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            return Peak(torch.cuda.max_memory_allocated(self._device) - self._start_bytes)
        return Peak(max(0, _status_bytes("VmHWM") - self._start_bytes))


def workspace_bytes(device: torch.device, step: Callable[[], object]) -> int | None:
    """Bytes that one `step` holds at its peak beyond what was held before it; None on a CPU.

    Workspaces of kernels, logits, and operands of exchanges. The step has run before, so that what
    a first run leaves behind is no part of it. None without a run: a CPU's resident memory does not
    show what is freed and taken again.
    """
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def release_memory(device: torch.device) -> None:
    """Give freed memory back, so that it is not taken for memory in use."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)


def _status_bytes(field: str) -> int:
    match = re.search(rf"^{field}:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    if match is None:
        raise OSError(f"{_STATUS} has no {field}")
    return int(match[1]) * 1024


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
