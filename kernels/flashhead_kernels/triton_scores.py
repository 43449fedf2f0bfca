"""Centroid scores in Triton: hidden states to int8, then integer dot products.

A cluster's score is a sum over segments, in ascending order, of sums over the segment's scale
groups, in ascending order, of float32 products of an exact integer. Its bits do not depend on the
program that computes a segment, on the block it is computed in, nor on what a rank holds.

A thread scores clusters of its own, so that nothing in the loop crosses threads: no barrier keeps
the loads of one step from being in flight with those of the next.
"""

# ruff: noqa: RUF005  (Triton adds tuples and unpacks none)

from __future__ import annotations

import triton
import triton.language as tl

from flashhead_kernels.triton_pieces import dot_words, four_words, round_to_int8, rounded_product
from flashhead_kernels.triton_reduce import row_logits


@triton.jit
def quantize_groups(
    state_ptr, words_ptr, scales_ptr, first_group, COUNT: tl.constexpr, CENTROIDS: tl.constexpr
):
    """Round COUNT scale groups, from first_group on, of the hidden state at state_ptr to int8.

    words_ptr: int32 `[2, groups, words]` OUT, for 4 bits the columns that the low halves of the
        bytes hold, then those of the high halves; for 8 bits only the first is used.
    scales_ptr: float32 `[2, groups]` OUT: scale, then (4 bits) 8 times the sum of the integers.
    """
    words: tl.constexpr = CENTROIDS.words
    groups: tl.constexpr = CENTROIDS.groups
    words_pad: tl.constexpr = CENTROIDS.words_pad
    width: tl.constexpr = CENTROIDS.width
    half: tl.constexpr = CENTROIDS.group_size // 2
    group = first_group + tl.arange(0, COUNT)
    word = tl.arange(0, words_pad)
    real = (group < groups)[:, None] & (word < words)[None, :]
    at = group[:, None] * words + word[None, :]
    column = group[:, None] * CENTROIDS.group_size + word[None, :] * width
    largest = tl.zeros([COUNT, words_pad], tl.float32)
    for byte in tl.static_range(width):
        value = tl.load(state_ptr + column + byte, mask=real, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(value))
        if CENTROIDS.bits == 4:
            value = tl.load(state_ptr + column + byte + half, mask=real, other=0.0).to(tl.float32)
            largest = tl.maximum(largest, tl.abs(value))
    scales = tl.div_rn(tl.max(largest, 1), 127.0)
    low = tl.zeros([COUNT, words_pad], tl.int32)
    high = tl.zeros([COUNT, words_pad], tl.int32)
    total = tl.zeros([COUNT, words_pad], tl.int32)
    for byte in tl.static_range(width):
        value = tl.load(state_ptr + column + byte, mask=real, other=0.0).to(tl.float32)
        integer = round_to_int8(value, scales[:, None])
        low |= (integer & 255) << (8 * byte)
        total += integer
        if CENTROIDS.bits == 4:
            value = tl.load(state_ptr + column + byte + half, mask=real, other=0.0).to(tl.float32)
            integer = round_to_int8(value, scales[:, None])
            high |= (integer & 255) << (8 * byte)
            total += integer
    tl.store(words_ptr + at, low, mask=real)
    tl.store(scales_ptr + group, scales, mask=group < groups)
    if CENTROIDS.bits == 4:
        tl.store(words_ptr + groups * words + at, high, mask=real)
        offset = 8 * tl.sum(total, 1)
        tl.store(scales_ptr + groups + group, offset.to(tl.float32), mask=group < groups)


@triton.jit
def hidden_norm(hidden_ptr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr):
    """Euclidean norm of the hidden state at hidden_ptr, float32; summed as a row's logit is."""
    row = tl.arange(0, ROWS)
    squares = row_logits(hidden_ptr, hidden_ptr, row.to(tl.int64) * 0, row < 1, D, BLOCK_D)
    return tl.sqrt_rn(tl.sum(squares, 0))


@triton.jit
def _zeros(count: tl.constexpr, size: tl.constexpr, kind: tl.constexpr):
    found = ()
    for _ in tl.static_range(count):
        found = found + (tl.zeros([size], kind),)
    return found


@triton.jit
def _add_words(
    packed, hidden_ptr, sums, QUAD: tl.constexpr, CENTROIDS: tl.constexpr, BATCH: tl.constexpr,
    COMPILED: tl.constexpr,
):  # fmt: skip
    """`sums` (a tensor `[slots]` a row) and the products of the words `packed` and each row's.

    packed: a tuple of tensors `[slots]`; hidden_ptr: the first row's word that meets the first.
    QUAD: there are four, and a row's are loaded at once.
    """
    half: tl.constexpr = CENTROIDS.groups * CENTROIDS.words
    found = ()
    for b in tl.static_range(BATCH):
        total = sums[b]
        for high in tl.static_range(2 if CENTROIDS.bits == 4 else 1):
            at = hidden_ptr + (2 * b + high) * half
            hidden = four_words(at, COMPILED) if QUAD else (tl.load(at),)
            for i in tl.static_range(len(packed)):
                word = hidden[i] + tl.zeros_like(packed[i])
                total = dot_words(packed[i] >> (4 * high), word, total, CENTROIDS.bits,
                                  CENTROIDS.width, COMPILED)  # fmt: skip
        found = found + (total,)
    return found


@triton.jit
def _words(row_ptr, first, real, COUNT: tl.constexpr, CENTROIDS: tl.constexpr):
    """COUNT words `[slots]` of each cluster from word `first` on: all loads before any use."""
    end: tl.constexpr = CENTROIDS.groups * CENTROIDS.words
    found = ()
    for i in tl.static_range(COUNT):
        inside = real & (first + i + tl.zeros(real.shape, tl.int32) < end)
        at = row_ptr + (first + i) * CENTROIDS.tile
        found = found + (tl.load(at, mask=inside, other=0).to(tl.int32),)
    return found


@triton.jit
def segment_dots(
    values_ptr, scales_ptr, words_ptr, hidden_scales_ptr, slots, real, segment,
    BATCH: tl.constexpr, CENTROIDS: tl.constexpr, COMPILED: tl.constexpr,
):  # fmt: skip
    """One segment's part of `h . centroid` for clusters `slots` (int32): BATCH tensors `[slots]`.

    values_ptr, scales_ptr: those of one probing group; words_ptr, hidden_scales_ptr: see
    `quantize_groups`, `[BATCH, ...]`.
    """
    tile: tl.constexpr = CENTROIDS.tile
    words: tl.constexpr = CENTROIDS.words
    groups: tl.constexpr = CENTROIDS.groups
    # More rows hide the memory's latency by their products, and take the registers.
    chunk: tl.constexpr = CENTROIDS.chunk if BATCH <= 2 else 0
    quads: tl.constexpr = words // 4 if CENTROIDS.chunk > 0 else 0
    # Word j of a row lies at j * tile: rows of one tile are interleaved.
    row_ptr = values_ptr + (slots // tile) * (tile * words * groups) + slots % tile
    scale_ptr = scales_ptr + (slots // tile) * (tile * groups) + slots % tile
    dots = _zeros(BATCH, real.shape[0], tl.float32)
    for step in tl.range(0, CENTROIDS.segment, max(chunk, 1)):
        first = segment * CENTROIDS.segment + step
        if chunk > 0:
            packed = _words(row_ptr, first * words, real, chunk * words, CENTROIDS)
        for place in tl.static_range(max(chunk, 1)):
            group = first + place
            inside = real & (group + tl.zeros_like(slots) < groups)
            group = tl.minimum(group, groups - 1)
            scale = tl.load(scale_ptr + group * tile, mask=inside, other=0.0).to(tl.float32)
            hidden_ptr = words_ptr + group * words
            sums = _zeros(BATCH, real.shape[0], tl.int32)
            if chunk > 0:
                for quad in tl.static_range(quads):
                    four = (
                        packed[place * words + 4 * quad], packed[place * words + 4 * quad + 1],
                        packed[place * words + 4 * quad + 2], packed[place * words + 4 * quad + 3],
                    )  # fmt: skip
                    sums = _add_words(four, hidden_ptr + 4 * quad, sums, True, CENTROIDS, BATCH,
                                      COMPILED)  # fmt: skip
            elif quads > 0:
                for quad in tl.range(0, quads):
                    four = _words(row_ptr, group * words + 4 * quad, inside, 4, CENTROIDS)
                    sums = _add_words(four, hidden_ptr + 4 * quad, sums, True, CENTROIDS, BATCH,
                                      COMPILED)  # fmt: skip
            else:
                for word in tl.range(0, words):
                    one = _words(row_ptr, group * words + word, inside, 1, CENTROIDS)
                    sums = _add_words(one, hidden_ptr + word, sums, False, CENTROIDS, BATCH,
                                      COMPILED)  # fmt: skip
            found = ()
            for b in tl.static_range(BATCH):
                at = hidden_scales_ptr + b * 2 * groups + group
                factor = scale * tl.load(at)
                integer = sums[b].to(tl.float32)
                if CENTROIDS.bits == 4:
                    integer -= tl.load(at + groups)
                product = rounded_product(integer, factor, COMPILED)
                found = found + (dots[b] + product,)
            dots = found
    return dots


@triton.jit
def integer_dots(
    values_ptr, scales_ptr, words_ptr, hidden_scales_ptr, slots, real,
    BATCH: tl.constexpr, CENTROIDS: tl.constexpr, COMPILED: tl.constexpr,
):  # fmt: skip
    """`h . centroid` float32 `[slots]` of BATCH rows, all segments; see `segment_dots`."""
    dots = _zeros(BATCH, real.shape[0], tl.float32)
    segments: tl.constexpr = (CENTROIDS.groups + CENTROIDS.segment - 1) // CENTROIDS.segment
    for segment in tl.range(0, segments):
        part = segment_dots(values_ptr, scales_ptr, words_ptr, hidden_scales_ptr, slots, real,
                            segment, BATCH, CENTROIDS, COMPILED)  # fmt: skip
        found = ()
        for b in tl.static_range(BATCH):
            found = found + (dots[b] + part[b],)
        dots = found
    return dots


@triton.jit
def float_dots(
    values_ptr, hidden_ptr, first_row, num_rows, slots, real,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BATCH: tl.constexpr,
):  # fmt: skip
    """As `integer_dots`, of 16-bit centroids of one probing group.

    The order of its sums over columns is the compiler's: kernels may differ in the last bit.
    """
    dots = _zeros(BATCH, real.shape[0], tl.float32)
    for first in tl.range(0, D, BLOCK_D):
        columns = first + tl.arange(0, BLOCK_D)
        values = tl.load(
            values_ptr + slots[:, None] * D + columns[None, :],
            mask=real[:, None] & (columns < D)[None, :],
            other=0.0,
        ).to(tl.float32)
        found = ()
        for b in tl.static_range(BATCH):
            row = tl.minimum(first_row + b, num_rows - 1)
            hidden = tl.load(hidden_ptr + row * D + columns, mask=columns < D, other=0.0)
            part = tl.sum(values * hidden.to(tl.float32)[None, :], 1)
            found = found + (dots[b] + part,)
        dots = found
    return dots
