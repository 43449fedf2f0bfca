"""What the CPU loops are made of: centroid products, candidate keys, and the choice of probes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numba import types
from numba.extending import overload

from flashhead_kernels.llvm_integer_dot import dot_int4, dot_int4_4, dot_int8, dot_int8_4
from flashhead_kernels.llvm_row_dot import row_dot
from flashhead_kernels.llvm_tile_dot import tile_dot_int4, tile_dot_int8
from flashhead_kernels.llvm_vectors import bfloat16_value, float_bits, prefetch
from flashhead_kernels.quantize import TILE

AHEAD_BYTES = 8192
"""How far ahead a sequential scan asks for memory: the processor's own prefetch stops at the end of
a 4 KiB page. 4 to 32 KiB measured alike, 2 KiB 1.8 times slower."""


def _cache_folder() -> str:
    """Where compiled loops are kept: a folder named by the sources that they are made from.

    numba's own cache looks at the file of the function alone, and would go on using code made from
    an older `llvm_row_dot`.
    """
    sources = sorted(Path(__file__).parent.glob("*.py"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return str(Path(root) / "flashhead-dist" / "kernels" / digest)


def jit(function: Callable[..., Any]) -> Any:
    """Compile `function` at its first call, without Python's lock, and keep the result on disk."""
    chosen = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = chosen or _cache_folder()
    try:
        return numba.njit(nogil=True, error_model="numpy", cache=True)(function)
    finally:
        numba.config.CACHE_DIR = chosen


def score_slots(*_: Any) -> None:
    """`score_slots(values, first, last, scales, query, b, size, group_size, tile, scores, at)`
    writes the products of centroids `first..last` and state `b` to `scores[at ...]`.

    `query` is (states, int8 states, starts, factors): see `quantize_query`. The centroids' dtype
    chooses the product. In tiles, `first` and `last` are multiples of 16.
    """
    raise TypeError("score_slots is for compiled code")


@overload(score_slots, strict=False)
def _score_slots(
    values: Any, first: Any, last: Any, scales: Any, query: Any, b: Any, size: Any,
    group_size: Any, tile: Any, scores: Any, at: Any,
) -> Any:  # fmt: skip
    if values.dtype == types.uint16:

        def bfloat16(values, first, last, scales, query, b, size, group_size, tile, scores, at):  # type: ignore[no-untyped-def]
            for slot in range(first, last):
                scores[at + slot - first] = row_dot(values, slot * size, query[0], b * size, size)[
                    0
                ]

        return bfloat16
    tiled, four, one, packed = (
        (tile_dot_int4, dot_int4_4, dot_int4, 2)
        if values.dtype == types.uint8
        else (tile_dot_int8, dot_int8_4, dot_int8, 1)
    )
    step = 32 * packed

    def integers(values, first, last, scales, query, b, size, group_size, tile, scores, at):  # type: ignore[no-untyped-def]
        n, stride = size // group_size, size // packed
        if tile > 1:
            for slot in range(first, last, TILE):
                tiled(
                    values, slot * stride, scales, slot * n, query[1], b * size, query[2],
                    b * n * 8, query[3], b * n, scores, at + slot - first, n, group_size,
                )  # fmt: skip
            return
        slot = first
        if group_size % step:
            for slot in range(first, last):
                scores[at + slot - first] = _plain_integer_dot(
                    values, slot * stride, packed, scales, slot * n, query, b, size, group_size
                )
            return
        while slot + 4 <= last:
            for i in range(slot * stride, (slot + 4) * stride, 64):
                prefetch(values, i + AHEAD_BYTES)
            out = at + slot - first
            scores[out], scores[out + 1], scores[out + 2], scores[out + 3] = four(
                values, slot * stride, scales, slot * n, query[1], b * size, query[2], b * n * 8,
                query[3], b * n, n, group_size,
            )  # fmt: skip
            slot += 4
        while slot < last:
            scores[at + slot - first] = one(
                values, slot * stride, scales, slot * n, query[1], b * size, query[2], b * n * 8,
                query[3], b * n, n, group_size,
            )[0]  # fmt: skip
            slot += 1

    return integers


@jit
def _plain_integer_dot(
    values: Any, at: int, packed: int, scales: Any, scale_at: int, query: Any, b: int, size: int,
    group_size: int,
) -> Any:  # fmt: skip
    """The same product for scale groups that are no multiple of the vector step.

    `packed` is the number of columns a byte.
    """
    total: Any = np.float32(0)
    for g in range(size // group_size):
        part = np.int32(0)
        state = b * size + g * group_size
        half = group_size // 2
        if packed == 2:
            for i in range(half):
                byte = np.int32(values[at + g * half + i])
                part += ((byte & 15) - 8) * np.int32(query[1][state + i])
                part += ((byte >> 4) - 8) * np.int32(query[1][state + half + i])
        else:
            for i in range(group_size):
                byte = np.int32(values[at + g * group_size + i])
                part += byte * np.int32(query[1][state + i])
        factor = query[3][b * (size // group_size) + g]
        total += np.float32(part) * (bfloat16_value(scales[scale_at + g]) * factor)
    return total


@jit
def quantize_query(
    states: Any, group_size: int, offset: int, integers: Any, starts: Any, factors: Any
) -> None:
    """Round float32 `states [n]` to int8 by scale group, as `quantize.quantize_hidden_states`.

    `offset` is what the centroids' stored bytes lie above their values (8 for int4, 128 for int8);
    a sum that starts at `-offset * sum(integers)` undoes it.
    """
    for g in range(factors.shape[0]):
        largest = np.float32(0)
        for i in range(g * group_size, (g + 1) * group_size):
            largest = max(largest, abs(states[i]))
        scale = largest / np.float32(127)
        total = np.int32(0)
        for i in range(g * group_size, (g + 1) * group_size):
            value = np.int32(0)
            if scale > 0:
                value = np.int32(np.rint(states[i] / scale))
            integers[i] = max(np.int32(-127), min(np.int32(127), value))
            total += integers[i]
        starts[g * 8] = -offset * total
        for lane in range(1, 8):
            starts[g * 8 + lane] = 0
        factors[g] = scale


@jit
def pack_key(logit: float, token_id: int) -> Any:
    """`keys.pack_keys` for one candidate."""
    bits = float_bits(np.float32(logit) + np.float32(0))
    ordered: Any = np.int64(bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF)))
    return (ordered << 32) | (np.int64(0xFFFFFFFF) - np.int64(token_id))


@jit
def insert_key(best: Any, at: int, k: int, key: int) -> None:
    """Put `key` into the descending list `best[at : at + k]`, dropping its last."""
    i = at + k - 1
    if key <= best[i]:
        return
    while i > at and best[i - 1] < key:
        best[i] = best[i - 1]
        i -= 1
    best[i] = key


@jit
def best_left(ordered: Any, threshold: int, count: int) -> Any:
    """Key of the greatest score that `select_slots` left, with id 0; EMPTY where it left none.

    ordered, threshold: as it left and returned them. What is above the threshold was all taken; at
    it lie ties, one of them left, or nothing.
    """
    if count == ordered.shape[0]:
        return np.int64(-(2**63))
    best = np.int32(-2147483648)
    for i in range(ordered.shape[0]):
        if ordered[i] <= threshold:
            best = max(best, ordered[i])
    return (np.int64(best) << 32) | np.int64(0xFFFFFFFF)


@jit
def select_slots(scores: Any, count: int, ordered: Any, slots: Any) -> Any:
    """Write to `slots` the `count` greatest of `scores`, ascending; of equal scores the lower slot.

    `ordered` is left with the scores' order-preserving bits. Returns the threshold in those bits
    above which every score was taken.

    Bisects the score's bit pattern: each step is one vectorized count, where a sort or a heap would
    branch at every element. A threshold that leaves exactly `count` ends it early.
    """
    bits = scores.view(np.int32)
    low, high = np.int32(2147483647), np.int32(-2147483648)
    for i in range(bits.shape[0]):
        value = bits[i] ^ ((bits[i] >> 31) & np.int32(0x7FFFFFFF))
        ordered[i] = value
        low = min(low, value)
        high = max(high, value)
    bottom, top = np.int64(low), np.int64(high)
    exact = False
    while bottom < top and not exact:
        middle = np.int32(bottom + ((top - bottom + 1) >> 1))
        above = np.int32(0)
        for i in range(ordered.shape[0]):
            above += np.int32(ordered[i] >= middle)
        if above >= count:
            bottom = np.int64(middle)
            exact = above == count
        else:
            top = np.int64(middle) - 1
    threshold = np.int32(bottom)
    if exact:
        threshold -= np.int32(1)
    ties = np.int32(count)
    for i in range(ordered.shape[0]):
        ties -= np.int32(ordered[i] > threshold)
    found = 0
    for i in range(ordered.shape[0]):
        if ordered[i] > threshold or (ordered[i] == threshold and ties > 0):
            if ordered[i] == threshold:
                ties -= 1
            slots[found] = i
            found += 1
    return threshold
