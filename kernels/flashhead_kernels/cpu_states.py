"""What goes into the CPU loops and what comes out: hidden states, and the keys of the best tokens.

A few hundred numbers, but a torch operator that meets a cold cache costs some forty microseconds,
and a step of the whole head takes two milliseconds: so these are compiled loops as well.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashhead_kernels.cpu_primitives import jit, quantize_query
from flashhead_kernels.llvm_row_dot import row_dot
from flashhead_kernels.llvm_vectors import bfloat16_value
from flashhead_kernels.quantize import QuantizedCentroids

Query = tuple[Any, Any, Any, Any, Any, int]
"""Flat arrays: float32 states, int8 states, starts and factors (see `quantize_query`), and what is
added to every score of a row; last, the columns of a centroid."""

_NUMPY_VIEW = {torch.bfloat16: torch.uint16, torch.float16: torch.int16}
_EXPONENT = {
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float16: (torch.int16, 0x7C00),
    torch.float32: (torch.int32, 0x7F800000),
}
_EMPTY = np.int64(-(2**63))
_MINUS_INFINITY_BITS = np.int32(-0x800000)


def flat(tensor: Tensor) -> Any:
    """A flat numpy view; bfloat16 as uint16 and float16 as int16, told apart by `llvm_row_dot`."""
    if not tensor.is_contiguous():
        raise ValueError("weights and index tensors must be contiguous")
    view = _NUMPY_VIEW.get(tensor.dtype)
    return (tensor if view is None else tensor.view(view)).view(-1).numpy()


def all_finite(hidden_states: Tensor) -> bool:
    """See `reference.all_finite`."""
    view, exponent = _EXPONENT[hidden_states.dtype]
    return bool(_no_full_exponent(hidden_states.contiguous().view(view).numpy(), exponent))


def float_states(hidden_states: Tensor) -> Any:
    """Hidden states as a flat float32 array."""
    if hidden_states.dtype is not torch.bfloat16:
        return hidden_states.float().contiguous().view(-1).numpy()
    states = np.empty(hidden_states.numel(), np.float32)
    _widen(flat(hidden_states.contiguous()), states)
    return states


def make_query(
    hidden_states: Tensor, centroids: QuantizedCentroids, alpha: float
) -> tuple[Query, Any, Any, Any]:
    """Hidden states in the forms that centroids are scored with, flat centroids, and the bias.

    bias: float32 `[B]`, alpha * |h|. Centroids of fewer columns (`QuantizedCentroids.projection`)
    meet the states in their coordinates, projected here in an order that depends on D alone.
    """
    batch, size = hidden_states.shape
    states, bias = float_states(hidden_states), np.empty(batch, np.float32)
    columns, probing, added = size, states, np.zeros(batch, np.float32)
    if centroids.projection is not None:
        columns, projection = centroids.hidden_size, centroids.projection
        probing = np.empty(batch * columns, np.float32)
        _project(
            states, size, flat(projection.to_state), flat(projection.mean), columns, probing, added
        )
    rounded = 0 if centroids.scales is None else batch
    groups = rounded * (columns // centroids.group_size)
    integers = np.empty(rounded * columns, np.int8)
    starts = np.empty(groups * 8, np.int32)
    factors = np.empty(groups, np.float32)
    offset = 8 if centroids.bits == 4 else 128
    _fill_query(
        states, size, alpha, bias, probing, centroids.group_size, offset, integers, starts, factors
    )
    scales = np.empty(0, np.uint16) if centroids.scales is None else flat(centroids.scales)
    query = (states, integers, starts, factors, added, columns)
    return query, flat(centroids.values), scales, bias


def unpack_keys(keys: Tensor) -> tuple[Tensor, Tensor]:
    """See `keys.unpack_keys`; for keys `[B, k]`."""
    packed = keys.contiguous().numpy()
    logits, ids = np.empty(packed.shape, np.float32), np.empty(packed.shape, np.int64)
    _unpack(packed, logits.view(np.int32), ids)
    return torch.from_numpy(logits), torch.from_numpy(ids)


@jit
def _widen(bits: Any, states: Any) -> None:
    for i in range(bits.shape[0]):
        states[i] = bfloat16_value(bits[i])


@jit
def _no_full_exponent(bits: Any, exponent: int) -> Any:
    """Whether no float has all bits of its exponent set, as NaN and inf have."""
    full = 0
    for number in bits.ravel():
        full += (number & exponent) == exponent
    return full == 0


@jit
def _project(
    states: Any, size: int, to_state: Any, mean: Any, columns: int, probing: Any, added: Any
) -> None:
    for b in range(added.shape[0]):
        for column in range(columns):
            found = row_dot(to_state, column * size, states, b * size, size)[0]
            probing[b * columns + column] = found
        added[b] = row_dot(mean, 0, states, b * size, size)[0]


@jit
def _fill_query(
    states: Any, size: int, alpha: float, bias: Any, probing: Any, group_size: int, offset: int,
    integers: Any, starts: Any, factors: Any,
) -> None:  # fmt: skip
    quantize_query(probing, group_size, offset, integers, starts, factors)
    for b in range(bias.shape[0]):
        squares = 0.0
        for i in range(b * size, (b + 1) * size):
            squares += states[i] * np.float64(states[i])
        bias[b] = np.float32(alpha * math.sqrt(squares))


@jit
def _unpack(keys: Any, bits: Any, ids: Any) -> None:
    for b in range(keys.shape[0]):
        for i in range(keys.shape[1]):
            key = keys[b, i]
            ordered = np.int32(key >> 32)
            bits[b, i] = ordered ^ ((ordered >> 31) & np.int32(0x7FFFFFFF))
            ids[b, i] = 0xFFFFFFFF - (key & 0xFFFFFFFF)
            if key == _EMPTY:
                bits[b, i] = _MINUS_INFINITY_BITS
                ids[b, i] = -1
