"""Memory that a kernel leaves its parts in, kept between launches.

A launch allocates nothing after the first of its kind, and its counters are left at 0: it can be
captured in a CUDA graph. One workspace serves one stream at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Workspace:
    """words int32 and scales float32: hidden states, see `quantize_hidden`.

    dots: float32, centroid scores between two launches; keys int64 and sums float32: each
    program's part; counters: int32, 0 between launches.
    """

    words: Tensor
    scales: Tensor
    dots: Tensor
    keys: Tensor
    sums: Tensor
    counters: Tensor


_kept: dict[tuple[object, ...], Workspace] = {}


def workspace(
    device: torch.device, *, words: int, scales: int, dots: int, parts: int, best: int, rows: int
) -> Workspace:
    """The workspace of these sizes, in elements, on `device` and its current stream.

    Raises:
        RuntimeError: the stream is captured and has no such workspace yet.
    """
    on_cuda = device.type == "cuda"
    stream = torch.cuda.current_stream(device).cuda_stream if on_cuda else 0
    key = (device, stream, words, scales, dots, parts, best, rows)
    if key not in _kept:
        if on_cuda and torch.cuda.is_current_stream_capturing():
            # The counters' zeros would be set by this graph alone, whose pool would own the memory.
            raise RuntimeError("run the head once on this stream before capturing it in a graph")
        _kept[key] = Workspace(
            words=torch.empty(words, dtype=torch.int32, device=device),
            scales=torch.empty(scales, device=device),
            dots=torch.empty(dots, device=device),
            keys=torch.empty(parts * best, dtype=torch.int64, device=device),
            sums=torch.empty(2 * parts, device=device),
            counters=torch.zeros(rows, dtype=torch.int32, device=device),
        )
    return _kept[key]
