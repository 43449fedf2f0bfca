"""Heads of one token between an attention's projections, normed and rotated in one call, on a CPU.

Su et al., "RoFormer" (2021), equation 34, in the order that has a pair's second value half a head
away. torch's is ten operators for queries and ten for keys, which cost a decoding step more than
the arithmetic.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray
from torch import Tensor

from flashhead_kernels.cpu_norm import normalize
from flashhead_kernels.cpu_primitives import jit
from flashhead_kernels.llvm_atomics import address


@jit
def _turn(heads: int, cos: int, sin: int, scale: int, count: int, size: int, eps: float) -> None:
    values: Any = carray(address(heads), (count * size,), np.float32)
    cosines: Any = carray(address(cos), (size,), np.float32)
    sines: Any = carray(address(sin), (size,), np.float32)
    if scale:
        normalize(heads, scale, heads, count, size, eps)
    half = size // 2
    for at in range(0, count * size, size):
        for i in range(half):
            a, b = values[at + i], values[at + half + i]
            values[at + i] = a * cosines[i] - b * sines[i]
            values[at + half + i] = b * cosines[half + i] + a * sines[half + i]


def turn_heads(
    heads: Tensor, cos: Tensor, sin: Tensor, scale: Tensor | None = None, eps: float = 0.0
) -> None:
    """Give queries or keys their position, in place, after an RMSNorm where `scale` is given.

    heads: float32 `[H, d]`, contiguous, d even. cos, sin, scale: float32 `[d]`, contiguous.
    """
    count, size = heads.shape
    _turn(
        heads.data_ptr(), cos.data_ptr(), sin.data_ptr(), 0 if scale is None else scale.data_ptr(),
        count, size, eps,
    )  # fmt: skip
