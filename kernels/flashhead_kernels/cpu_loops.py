"""The head's inner loops for a CPU, compiled by numba; `cpu` wraps them for torch tensors.

Each function of a range takes flat arrays and a half-open range of groups or row blocks, holds no
lock and writes to places of its own, so `cpu` can hand ranges to threads. `state`s are float32
hidden states. Results are per group (or per block of rows) and merged by the caller in a fixed
order, so that nothing depends on the number of threads.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numba import types
from numba.extending import overload

from flashhead_kernels.llvm_dots import (
    dot_int4,
    dot_int4_4,
    dot_int8,
    dot_int8_4,
    row_dot,
    row_dot_4,
    tile_dot_int4,
    tile_dot_int8,
)
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


_EMPTY = np.int64(-(2**63))
_LINE_BYTES = 64
ROW_BLOCK = 4096
"""Rows of a dense shard that make one partial result."""


@jit
def score_groups(
    first: int, last: int, query: Any, batch: int, values: Any, scales: Any,
    group_size: int, tile: int, spread: Any, bias: Any, clusters: int, scores: Any, stride: int,
) -> None:  # fmt: skip
    """Probing scores of groups `first..last` into `scores [B, stride]` (flat), the first at 0."""
    for group in range(first, last):
        for b in range(batch):
            at = b * stride + (group - first) * clusters
            base = group * clusters
            score_slots(
                values, base, base + clusters, scales, query, b, query[5], group_size, tile, scores,
                at,
            )  # fmt: skip
            for slot in range(clusters):
                scores[at + slot] += query[4][b]
                score = scores[at + slot] + bias[b] * spread[base + slot]
                # A cluster of pads has spread -inf: -inf * 0 would be NaN.
                scores[at + slot] = spread[base + slot] if spread[base + slot] < 0 else score


@jit
def scan_cluster(
    cluster: int, following: int, rows: Any, token_ids: Any, tokens: int, states: Any, b: int,
    size: int, k: int, best: Any, best_at: int, logits: Any, logits_at: int,
) -> None:  # fmt: skip
    """Score one cluster's tokens into `logits` (-inf for pads) and its keys into `best`."""
    step = _LINE_BYTES // rows.itemsize
    ahead = (following - cluster) * tokens * size
    if following >= 0:
        prefetch(token_ids, following * tokens)
    for j in range(cluster * tokens, (cluster + 1) * tokens):
        logit = np.float32(-np.inf)
        if following >= 0:
            # A row ahead of each row scored: a whole cluster at once overruns the fill buffers.
            for i in range(j * size + ahead, (j + 1) * size + ahead, step):
                prefetch(rows, i)
        if token_ids[j] >= 0:
            logit = row_dot(rows, j * size, states, b * size, size)[0]
            insert_key(best, best_at, k, pack_key(logit, token_ids[j]))
        logits[logits_at + j - cluster * tokens] = logit


@jit
def scan_clusters(
    first: int, last: int, rows: Any, token_ids: Any, tokens: int, states: Any, batch: int,
    size: int, cluster_ids: Any, k: int, best: Any, logits: Any,
) -> None:  # fmt: skip
    """Score clusters `cluster_ids [B, n]` (flat, -1: none) at positions first..last of `B * n`.

    best: keys `[positions, k]`, logits: `[positions, S]`, both flat.
    """
    per_row = cluster_ids.shape[0] // batch
    for position in range(first, last):
        cluster = cluster_ids[position]
        if cluster >= 0:
            following = -1
            if position + 1 < last:
                following = cluster_ids[position + 1]
            scan_cluster(
                cluster, following, rows, token_ids, tokens, states, position // per_row, size,
                k, best, position * k, logits, position * tokens,
            )  # fmt: skip


@jit
def probe_groups(
    first: int, last: int, query: Any, batch: int, size: int, values: Any, scales: Any,
    group_size: int, tile: int, spread: Any, bias: Any, clusters: int, probes: int, rows: Any,
    token_ids: Any, tokens: int, pinned_rows: Any, pinned_ids: Any, pinned: int, k: int,
    need_mass: bool, best: Any, peak: Any, mass: Any, left: Any,
) -> None:  # fmt: skip
    """The whole head for groups `first..last`: `score_groups`, then `scan_best_groups`.

    A phase at a time over all the groups, so that the scan of rows can look ahead across groups.
    """
    stride = (last - first) * clusters
    scores = np.empty(batch * stride, np.float32)
    score_groups(
        first, last, query, batch, values, scales, group_size, tile, spread, bias, clusters,
        scores, stride,
    )  # fmt: skip
    scan_best_groups(
        first, last, query, batch, size, spread, bias, clusters, probes, rows, token_ids, tokens,
        pinned_rows, pinned_ids, pinned, k, need_mass, scores, stride, best, peak, mass,
        left,
    )  # fmt: skip


@jit
def scan_best_groups(
    first: int, last: int, query: Any, batch: int, size: int, spread: Any, bias: Any, clusters: int,
    probes: int, rows: Any, token_ids: Any, tokens: int, pinned_rows: Any, pinned_ids: Any,
    pinned: int, k: int, need_mass: bool, scores: Any, stride: int, best: Any, peak: Any, mass: Any,
    left: Any,
) -> None:  # fmt: skip
    """Select each group's probes by `scores [B, stride]`, the first that of `first`, and scan them.

    best: int64 `[N, B, k]`; peak, mass: float32 `[N, B]`, the group's greatest exponent and its
    sum of exponentials relative to it; left: int64 `[N, B]`, the key of its best unprobed cluster,
    or empty where none is wanted. All flat.
    """
    groups = last - first
    ordered = np.empty(clusters, np.int32)
    slots = np.empty(groups * probes + 1, np.int64)
    logits = np.empty(probes * tokens + pinned, np.float32)
    for b in range(batch):
        for group in range(first, last):
            at = b * stride + (group - first) * clusters
            chosen = slots[(group - first) * probes : (group - first + 1) * probes]
            threshold = select_slots(scores[at : at + clusters], probes, ordered, chosen)
            if left.shape[0]:
                left[group * batch + b] = best_left(ordered, threshold, probes)
            for i in range(probes):
                chosen[i] += group * clusters
        slots[groups * probes] = -1
        for group in range(first, last):
            at = (group * batch + b) * k
            for i in range(at, at + k):
                best[i] = _EMPTY
            for i in range(probes):
                position = (group - first) * probes + i
                scan_cluster(
                    slots[position], slots[position + 1], rows, token_ids, tokens, query[0], b,
                    size, k, best, at, logits, i * tokens,
                )  # fmt: skip
            if pinned:
                scan_cluster(
                    group, -1, pinned_rows, pinned_ids, pinned, query[0], b, size,
                    k, best, at, logits, probes * tokens,
                )  # fmt: skip
            if need_mass:
                start = b * stride + (group - first) * clusters
                chosen = slots[(group - first) * probes : (group - first + 1) * probes]
                _closed_form_mass(
                    group * clusters, clusters, tokens, token_ids, scores[start : start + clusters],
                    chosen, spread, bias[b], logits, group * batch + b, peak, mass,
                )  # fmt: skip


@jit
def _closed_form_mass(
    base: int, clusters: int, tokens: int, token_ids: Any, scores: Any, chosen: Any, spread: Any,
    bias: float, logits: Any, at: int, peak: Any, mass: Any,
) -> None:  # fmt: skip
    """Mass of one group: scored logits exactly, unprobed clusters as `tokens * exp(h . mean)`."""
    for i in range(chosen.shape[0]):
        scores[chosen[i] - base] = -np.inf
    greatest = np.float32(-np.inf)
    for i in range(logits.shape[0]):
        greatest = max(greatest, logits[i])
    for slot in range(clusters):
        if scores[slot] > -np.inf:
            scores[slot] -= bias * spread[base + slot]
            greatest = max(greatest, scores[slot])
    total = np.float32(0)
    if greatest > -np.inf:
        for i in range(logits.shape[0]):
            total += math.exp(logits[i] - greatest)
        for slot in range(clusters):
            if scores[slot] > -np.inf:
                real = 0
                for j in range((base + slot) * tokens, (base + slot + 1) * tokens):
                    real += token_ids[j] >= 0
                total += real * math.exp(scores[slot] - greatest)
    peak[at] = greatest
    mass[at] = total


@jit
def merge_keys(best: Any, merged: Any) -> None:
    """The k greatest keys of each row of `best [parts, B, k]`, flat, into `merged [B, k]`."""
    batch, k = merged.shape
    flat = merged.ravel()
    flat[:] = _EMPTY
    for i in range(best.shape[0]):
        insert_key(flat, i // k % batch * k, k, best[i])


@jit
def scan_dense(
    first: int, last: int, rows: Any, count: int, states: Any, batch: int, size: int,
    token_ids: Any, first_token: int, k: int, need_mass: bool, best: Any, peak: Any, mass: Any,
) -> None:  # fmt: skip
    """Score row blocks `first..last` of `rows [count, D]`: every row against every state.

    token_ids: int32 `[count]`, -1 for a pad; empty where tokens count up from first_token.

    best: int64 `[blocks, B, k]`; peak, mass: float32 `[blocks, B]`. All flat.
    """
    logits = np.empty(batch, np.float32)
    step, ahead = _LINE_BYTES // rows.itemsize, AHEAD_BYTES // rows.itemsize
    for block in range(first, last):
        for i in range(block * batch * k, (block + 1) * batch * k):
            best[i] = _EMPTY
        for i in range(block * batch, (block + 1) * batch):
            peak[i] = -np.inf
            mass[i] = 0
        for row in range(block * ROW_BLOCK, min((block + 1) * ROW_BLOCK, count)):
            for i in range(row * size, (row + 1) * size, step):
                prefetch(rows, i + ahead)
            token = first_token + row
            if token_ids.shape[0]:
                token = token_ids[row]
            if token < 0:
                continue
            whole = batch - batch % 4
            for b in range(0, whole, 4):
                four = row_dot_4(rows, row * size, states, b * size, size)
                logits[b], logits[b + 1], logits[b + 2], logits[b + 3] = four
            for b in range(whole, batch):
                logits[b] = row_dot(rows, row * size, states, b * size, size)[0]
            for b in range(batch):
                at = block * batch + b
                insert_key(best, at * k, k, pack_key(logits[b], token))
                if need_mass:
                    if logits[b] > peak[at]:
                        mass[at] = mass[at] * math.exp(peak[at] - logits[b]) + np.float32(1)
                        peak[at] = logits[b]
                    else:
                        mass[at] += math.exp(logits[b] - peak[at])
