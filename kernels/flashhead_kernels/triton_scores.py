"""Centroid scores in Triton: hidden states to int8 once a program, then integer dot products.

A cluster's score is a sum over scale groups in ascending order, of float32 products of an exact
integer: its bits do not depend on the block that it is computed in, nor on what a rank holds.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flashhead_kernels.triton_pieces import dot_words, round_to_int8, rounded_product


@triton.jit
def quantize_hidden(hidden_ptr, words_ptr, scales_ptr, place, CENTROIDS: tl.constexpr):
    """Round the hidden state at hidden_ptr to int8 by scale group, pack it, and keep it as `place`.

    words_ptr: int32 `[B, 2, groups, words]`, for 4 bits the columns that the low halves of the
        bytes hold, then those of the high halves; for 8 bits only the first is used.
    scales_ptr: float32 `[B, 2, groups]`: scale, then (4 bits) 8 times the sum of the integers.
    """
    width: tl.constexpr = CENTROIDS.width
    words: tl.constexpr = CENTROIDS.words
    words_pad: tl.constexpr = CENTROIDS.words_pad
    groups_pad: tl.constexpr = CENTROIDS.groups_pad
    group = tl.arange(0, groups_pad)[:, None, None]
    word = tl.arange(0, words_pad)[None, :, None]
    byte = tl.arange(0, width)[None, None, :]
    real = (group < CENTROIDS.groups) & (word < words)
    column = group * CENTROIDS.group_size + word * width + byte
    low = tl.load(hidden_ptr + column, mask=real, other=0.0).to(tl.float32)
    largest = tl.max(tl.max(tl.abs(low), 2), 1)
    if CENTROIDS.bits == 4:
        half: tl.constexpr = CENTROIDS.group_size // 2
        high = tl.load(hidden_ptr + column + half, mask=real, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.max(tl.abs(high), 2), 1))
    scales = tl.div_rn(largest, 127.0)
    base = words_ptr + place * 2 * CENTROIDS.groups * words
    at = tl.arange(0, groups_pad)[:, None] * words + tl.arange(0, words_pad)[None, :]
    stored = tl.reshape(real, [groups_pad, words_pad])
    integers = round_to_int8(low, scales[:, None, None] + tl.zeros_like(low))
    tl.store(base + at, tl.sum((integers & 255) << (8 * byte), 2), mask=stored)
    groups = tl.arange(0, groups_pad)
    scale_base = scales_ptr + place * 2 * CENTROIDS.groups + groups
    tl.store(scale_base, scales, mask=groups < CENTROIDS.groups)
    if CENTROIDS.bits == 4:
        high_integers = round_to_int8(high, scales[:, None, None] + tl.zeros_like(high))
        packed = tl.sum((high_integers & 255) << (8 * byte), 2)
        tl.store(base + CENTROIDS.groups * words + at, packed, mask=stored)
        offset = 8 * tl.sum(tl.sum(integers + high_integers, 2), 1)
        tl.store(scale_base + CENTROIDS.groups, offset.to(tl.float32),
                 mask=groups < CENTROIDS.groups)  # fmt: skip


@triton.jit
def hidden_norm(hidden_ptr, row, D: tl.constexpr, D_PAD: tl.constexpr):
    """Euclidean norm of row `row` of `hidden [B, D]`, float32."""
    columns = tl.arange(0, D_PAD)
    values = tl.load(hidden_ptr + row * D + columns, mask=columns < D, other=0.0).to(tl.float32)
    return tl.sqrt_rn(tl.sum(values * values, 0))


@triton.jit
def integer_dots(
    values_ptr, scales_ptr, words_ptr, hidden_scales_ptr, slots, real_slots,
    BATCH: tl.constexpr, BATCH_PAD: tl.constexpr, CENTROIDS: tl.constexpr, DP4A: tl.constexpr,
):  # fmt: skip
    """`h . centroid` float32 `[BATCH_PAD, slots]` for clusters `slots` (int32, whole tiles).

    Sums of integers are exact, floats are added in a fixed order, and no product is fused into a
    sum: every kernel gives the same bits, however its program is laid out.

    values_ptr, scales_ptr: those of one probing group; words_ptr, hidden_scales_ptr: see
    `quantize_hidden`, at the first row of BATCH.
    """
    tile: tl.constexpr = CENTROIDS.tile
    words: tl.constexpr = CENTROIDS.words
    groups: tl.constexpr = CENTROIDS.groups
    chunk: tl.constexpr = CENTROIDS.chunk
    words_pad: tl.constexpr = CENTROIDS.words_pad
    batch = tl.arange(0, BATCH_PAD)[:, None]
    dots = tl.zeros([BATCH_PAD, slots.shape[0]], tl.float32)
    # Word j of a row lies at j * tile: rows of one tile are interleaved.
    row = (slots // tile) * (tile * words * groups) + slots % tile
    scale_row = (slots // tile) * (tile * groups) + slots % tile
    for first in tl.range(0, groups, chunk, loop_unroll_factor=4 if BATCH == 1 else 1):
        group = first + tl.arange(0, chunk)
        word = tl.arange(0, words_pad)
        place = group[:, None] * words + word[None, :]
        inside = (group < groups)[:, None] & (word < words)[None, :]
        packed = tl.load(
            values_ptr + row[:, None, None] + (place * tile)[None, :, :],
            mask=real_slots[:, None, None] & inside[None, :, :],
            other=0,
        ).to(tl.int32)
        scale = tl.load(
            scales_ptr + scale_row[:, None] + (group * tile)[None, :],
            mask=real_slots[:, None] & (group < groups)[None, :],
            other=0.0,
        ).to(tl.float32)
        for b in tl.static_range(BATCH):
            hidden = words_ptr + b * 2 * groups * words
            low = tl.load(hidden + place, mask=inside, other=0)
            products = dot_words(packed, low[None, :, :] + tl.zeros_like(packed),
                                 CENTROIDS.bits, CENTROIDS.width, DP4A)  # fmt: skip
            hidden_scale = hidden_scales_ptr + b * 2 * groups + group
            offset = tl.zeros([chunk], tl.float32)
            if CENTROIDS.bits == 4:
                high = tl.load(hidden + groups * words + place, mask=inside, other=0)
                products += dot_words(packed >> 4, high[None, :, :] + tl.zeros_like(packed),
                                      CENTROIDS.bits, CENTROIDS.width, DP4A)  # fmt: skip
                offset = tl.load(hidden_scale + groups, mask=group < groups, other=0.0)
            factor = tl.load(hidden_scale, mask=group < groups, other=0.0)
            integer = tl.sum(products, 2).to(tl.float32) - offset[None, :]
            part = tl.sum(rounded_product(integer, scale * factor[None, :], DP4A), 1)
            dots += tl.where(batch == b, part[None, :], 0.0)
    return dots


@triton.jit
def float_dots(
    values_ptr, hidden_ptr, first_row, num_rows, slots, real_slots,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BATCH: tl.constexpr, BATCH_PAD: tl.constexpr,
):  # fmt: skip
    """`h . centroid` float32 `[BATCH_PAD, slots]` of 16-bit centroids of one probing group.

    The order of its sums over columns is the compiler's: kernels may differ in the last bit.
    """
    batch = tl.arange(0, BATCH_PAD)[:, None]
    dots = tl.zeros([BATCH_PAD, slots.shape[0]], tl.float32)
    for first in tl.range(0, D, BLOCK_D):
        columns = first + tl.arange(0, BLOCK_D)
        values = tl.load(
            values_ptr + slots[:, None] * D + columns[None, :],
            mask=real_slots[:, None] & (columns < D)[None, :],
            other=0.0,
        ).to(tl.float32)
        for b in tl.static_range(BATCH):
            row = tl.minimum(first_row + b, num_rows - 1)
            hidden = tl.load(hidden_ptr + row * D + columns, mask=columns < D, other=0.0)
            part = tl.sum(values * hidden.to(tl.float32)[None, :], 1)
            dots += tl.where(batch == b, part[None, :], 0.0)
    return dots
