"""Memory that a CPU scans fast."""

from __future__ import annotations

import math
import mmap
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor

LARGE_PAGE_BYTES = 2 << 20


def empty_on_large_pages(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialized CPU tensor, on large pages where it fills some and the kernel has any.

    Weights are read once a step with a cold cache, and on small pages the addresses miss the
    translation cache as well. Gemma-3-270M's dense head takes 11.5 ms instead of 12.9, FlashHead
    1.90 instead of 2.03 (one thread).
    """
    num_bytes = dtype.itemsize * math.prod(shape)
    if num_bytes < 2 * LARGE_PAGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype)
    # Python's default is shared memory, which gets large pages on few systems.
    memory = mmap.mmap(
        -1, num_bytes + LARGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    )
    with suppress(OSError):  # a kernel built without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    buffer = np.frombuffer(memory, np.uint8)
    start = -buffer.ctypes.data % LARGE_PAGE_BYTES
    return torch.from_numpy(buffer[start : start + num_bytes]).view(dtype).view(shape)
