"""What a launch needs of its device: the number of SMs, the counters, and to be current.

Besides the counters nothing outlives a launch: what it leaves its parts in comes from torch's
allocator, is counted there, and belongs to the pool of the graph that a launch is captured in. A
launch serves at most `MAX_ROWS` rows, which bounds it (`docs/kernels.md` has figures).
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from flashhead_kernels.triton_shapes import MAX_ROWS

_INTERPRETED_PROCESSORS = 4
"""SMs of the GPU that the interpreter stands in for; few, so that small shapes fill it."""
_HALF = 1 << 63
_counters: dict[tuple[torch.device, int], Tensor] = {}


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's device current: Triton launches on the current one."""
    return torch.cuda.device_of(tensor)  # type: ignore[no-untyped-call]


@functools.cache
def num_processors(device: torch.device) -> int:
    """SMs of a CUDA device."""
    if device.type != "cuda":
        return _INTERPRETED_PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def counters(device: torch.device) -> Tensor:
    """int32 `[MAX_ROWS]` for the current stream of `device`: 0 before and after each launch.

    Raises:
        RuntimeError: the stream is captured and has none yet.
    """
    on_cuda = device.type == "cuda"
    stream = torch.cuda.current_stream(device).cuda_stream if on_cuda else 0
    found = _counters.get((device, stream))
    if found is None:
        if on_cuda and torch.cuda.is_current_stream_capturing():
            # The zeros would be set by this graph alone, whose pool would own the memory.
            raise RuntimeError("run the head once on this stream before capturing it in a graph")
        found = torch.zeros(MAX_ROWS, dtype=torch.int32, device=device)
        _counters[device, stream] = found
    return found


def signed_seed(seed: int) -> int:
    """The same 64 bits as a signed number: a kernel's argument has one type."""
    return (seed + _HALF) % (2 * _HALF) - _HALF
