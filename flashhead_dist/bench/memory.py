"""Peak memory of a piece of work: resident memory of the process, or CUDA memory of its device.

On CUDA it is that of torch's allocator, which kernels take their workspaces from too.

The resident peak is the kernel's high-water mark (VmHWM), reset before the work, less the resident
memory at that point. It counts pages of mapped checkpoint files while they are mapped.
"""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

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
