"""Root-mean-square normalisation of a few states in one call, on a CPU.

Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019), equation 4. torch's is five
operators, which cost a decoding step more than the arithmetic: 109 of them 3.5 ms.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numba import carray
from torch import Tensor

from flashhead_kernels.cpu_primitives import jit
from flashhead_kernels.llvm_atomics import address
from flashhead_kernels.llvm_row_dot import row_dot


@jit
def normalize(states: int, weight: int, result: int, rows: int, size: int, eps: float) -> None:
    """RMSNorm of `rows` states at an address, for compiled code; `result` may be `states`."""
    values: Any = carray(address(states), (rows * size,), np.float32)
    factors: Any = carray(address(weight), (size,), np.float32)
    out: Any = carray(address(result), (rows * size,), np.float32)
    for at in range(0, rows * size, size):
        mean = row_dot(values, at, values, at, size)[0] / np.float32(size)
        scale = np.float32(1) / np.float32(math.sqrt(mean + np.float32(eps)))
        for i in range(size):
            out[at + i] = values[at + i] * scale * factors[i]


def rms_norm(states: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`states / sqrt(mean(states ** 2) + eps) * weight`, as `torch.nn.functional.rms_norm`.

    states: float32 `[..., D]` on a CPU. weight: float32 `[D]`, contiguous. On one thread.
    """
    size = weight.numel()
    states = states.contiguous()
    result = torch.empty_like(states)
    if size:
        normalize(
            states.data_ptr(), weight.data_ptr(), result.data_ptr(), states.numel() // size, size,
            eps,
        )  # fmt: skip
    return result
