"""The kernels of a FlashHead step: all in one launch, or centroid scores and candidates in two.

One launch: a program is a probing group and up to eight rows, so that it reads each centroid once.
Two launches: clusters, and segments of their columns, are spread over programs; then the candidates
of a group and row are. Both run the same code on blocks whose rows lie in warps alike, and with
integer centroids give the same bits.

A cluster's score is a sum over segments, in ascending order, of sums over the segment's scale
groups, in ascending order, of float32 products of an exact integer. Its bits do not depend on the
program that computes a segment, on the block it is computed in, nor on what a rank holds. A thread
scores clusters of its own: no barrier keeps the loads of one step from being in flight with those
of the next.

Letters: `N` probing groups of `M` clusters of `S` tokens, `D` hidden size, `B` rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flashhead_kernels.triton_reduce import (
    arrive,
    dot_words,
    four_words,
    hidden_norm,
    probe_group,
    quantize_groups,
    reduce_parts,
    rounded_product,
    row_logits,
    write_part,
)

# ruff: noqa: RUF005  (Triton adds tuples and unpacks none)


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


# A batch of one, or of sixteen, must not compile a kernel of its own.
_UNSPECIALISED = ("num_rows", "probes_a_split")


@triton.jit(do_not_specialize=_UNSPECIALISED)
def prepare_kernel(
    hidden_ptr,  # [B, D]
    to_state_ptr,  # float32 [columns, D], or unused
    mean_ptr,  # float32 [D], or unused
    coordinates_ptr,  # OUT: float32 [B, columns] where PROJECTED
    means_ptr,  # OUT: float32 [B] where PROJECTED
    words_ptr,  # OUT: int32 [B, 2, groups, words], see `quantize_groups`
    scales_ptr,  # OUT: float32 [B, 2, groups]
    CENTROIDS: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    PROJECTED: tl.constexpr,
):  # fmt: skip
    """Grid `[B, blocks of GROUPS scale groups]`: a row to int8, for all programs that score it.

    PROJECTED: first `quantize.project_states`. What a program computes for its row does not
    depend on how many rows there are.
    """
    words: tl.constexpr = CENTROIDS.words
    groups: tl.constexpr = CENTROIDS.groups
    size: tl.constexpr = CENTROIDS.group_size
    row, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * GROUPS
    state_ptr = hidden_ptr + row * D
    if PROJECTED:
        coordinates_ptr += row * (groups * size)
        for column in tl.range(first * size, tl.minimum(first + GROUPS, groups) * size, 16):
            columns = column + tl.arange(0, 16)
            real = columns < groups * size
            found = row_logits(to_state_ptr, state_ptr, columns.to(tl.int64), real, D, BLOCK_D)
            tl.store(coordinates_ptr + columns, found, mask=real)
        if tl.program_id(1) == 0:
            one = tl.arange(0, 1)
            mean = row_logits(mean_ptr, state_ptr, one.to(tl.int64), one < 1, D, BLOCK_D)
            tl.store(means_ptr + row + one, mean)
        tl.debug_barrier()
        state_ptr = coordinates_ptr
    words_ptr += row * (2 * groups * words)
    scales_ptr += row * (2 * groups)
    quantize_groups(state_ptr, words_ptr, scales_ptr, first, GROUPS, CENTROIDS)


@triton.jit
def quantize_rows(
    hidden_ptr, words_ptr, scales_ptr, first_row, num_rows, D: tl.constexpr, BATCH: tl.constexpr,
    GROUPS_PAD: tl.constexpr, CENTROIDS: tl.constexpr,
):  # fmt: skip
    """`prepare_kernel` within a program, for BATCH rows from first_row; the last one repeats.

    Programs of the same rows share words_ptr and scales_ptr: all of them write the same there.
    """
    words: tl.constexpr = CENTROIDS.words
    groups: tl.constexpr = CENTROIDS.groups
    for b in tl.static_range(BATCH):
        row = tl.minimum(first_row + b, num_rows - 1)
        quantize_groups(hidden_ptr + row * D, words_ptr + (first_row + b) * (2 * groups * words),
                        scales_ptr + (first_row + b) * (2 * groups), 0, GROUPS_PAD,
                        CENTROIDS)  # fmt: skip
    tl.debug_barrier()


@triton.jit
def stacked(dots, BATCH: tl.constexpr):
    """A tuple of BATCH tensors `[slots]` as `[BATCH, slots]`."""
    batch = tl.arange(0, BATCH)[:, None]
    found = tl.zeros([BATCH, dots[0].shape[0]], tl.float32)
    for b in tl.static_range(BATCH):
        found = tl.where(batch == b, dots[b][None, :], found)
    return found


@triton.jit(do_not_specialize=_UNSPECIALISED)
def one_launch_kernel(
    hidden_ptr,  # [B, D]
    rows_ptr,  # [N, M, S, D]
    ids_ptr,  # int32 [N, M, S]
    values_ptr,  # [N, group_values], centroids
    scales_ptr,  # [N, group_scales], their scales
    spread_ptr,  # float32 [N, M]
    pinned_rows_ptr,  # [N, n, D]
    pinned_ids_ptr,  # int32 [N, n]
    words_ptr,  # int32 [B, 2, groups, words]: of `prepare_kernel`, or OUT
    hidden_scales_ptr,  # float32 [B, 2, groups]: likewise
    means_ptr,  # float32 [B] where PROJECTED, added to scores
    keys_ptr,  # OUT: int64 [B, N, best], then [B, N]: parts
    sums_ptr,  # OUT: float32 [B, N, 2]
    counters_ptr,  # int32 [blocks of B], 0 before and after
    out_keys_ptr,  # OUT: int64 [B, best], then [B]
    out_ids_ptr,  # OUT: int64 [B, best]
    out_logits_ptr,  # OUT: float32 [B, best]
    out_logsumexp_ptr,  # OUT: float32 [B]
    alpha, num_rows, group_values, group_scales, HEAD: tl.constexpr, CENTROIDS: tl.constexpr,
    BATCH: tl.constexpr, ROWS: tl.constexpr, GROUPS_PAD: tl.constexpr, PREPARED: tl.constexpr,
    PROJECTED: tl.constexpr, LOGSUMEXP: tl.constexpr, UNPROBED: tl.constexpr,
    PART_BLOCK: tl.constexpr, COMPILED: tl.constexpr,
):  # fmt: skip
    """Grid `[N, blocks of BATCH rows]`: from hidden states to the rank's best keys.

    ROWS: of the output embedding that are scored at a time.
    """
    D: tl.constexpr = HEAD.hidden_size
    group = tl.program_id(0)
    num_groups = tl.num_programs(0)
    first_row = tl.program_id(1) * BATCH
    slots = tl.arange(0, HEAD.clusters_pad)
    real = slots < HEAD.clusters
    values_ptr += group.to(tl.int64) * group_values
    scales_ptr += group.to(tl.int64) * group_scales
    if CENTROIDS is None:
        dots = stacked(float_dots(values_ptr, hidden_ptr, first_row, num_rows, slots, real, D, 32,
                                  BATCH), BATCH)  # fmt: skip
    else:
        if not PREPARED:
            quantize_rows(hidden_ptr, words_ptr, hidden_scales_ptr, first_row, num_rows, D, BATCH,
                          GROUPS_PAD, CENTROIDS)  # fmt: skip
        words_ptr += first_row * (2 * CENTROIDS.groups * CENTROIDS.words)
        hidden_scales_ptr += first_row * (2 * CENTROIDS.groups)
        dots = stacked(integer_dots(values_ptr, scales_ptr, words_ptr, hidden_scales_ptr, slots,
                                    real, BATCH, CENTROIDS, COMPILED), BATCH)  # fmt: skip
    batch = tl.arange(0, BATCH)[:, None]
    last_row = tl.minimum(first_row + BATCH, num_rows)
    for row in tl.range(first_row, last_row):
        of_row = tl.sum(tl.where(batch == row - first_row, dots, 0.0), 0)
        if PROJECTED:
            of_row += tl.load(means_ptr + row)
        best, greatest, total, left = probe_group(
            of_row, hidden_norm(hidden_ptr + row * D, D, HEAD.block_columns, ROWS), alpha, group,
            hidden_ptr + row * D, rows_ptr, ids_ptr, spread_ptr, pinned_rows_ptr, pinned_ids_ptr,
            0, HEAD.probes, HEAD, ROWS, LOGSUMEXP, UNPROBED,
        )  # fmt: skip
        write_part(row * num_groups + group, num_rows * num_groups, best, greatest, total, left,
                   keys_ptr, sums_ptr, LOGSUMEXP, UNPROBED)  # fmt: skip
    if arrive(counters_ptr + tl.program_id(1), num_groups):
        for row in tl.range(first_row, last_row):
            reduce_parts(row, num_rows, num_groups, keys_ptr, sums_ptr, out_keys_ptr, out_ids_ptr,
                         out_logits_ptr, out_logsumexp_ptr, HEAD.best, PART_BLOCK, LOGSUMEXP,
                         UNPROBED)  # fmt: skip


@triton.jit(do_not_specialize=_UNSPECIALISED)
def dots_kernel(
    hidden_ptr,  # [B, D]
    values_ptr,  # [N, group_values], centroids
    scales_ptr,  # [N, group_scales], their scales
    words_ptr,  # int32 [B rounded up, 2, groups, words]: of `prepare_kernel`, or OUT
    hidden_scales_ptr,  # float32 [B rounded up, 2, groups]: likewise
    dots_ptr,  # OUT: float32 [segments, B, N, M]
    num_rows, group_values, group_scales, HEAD: tl.constexpr, CENTROIDS: tl.constexpr,
    SEGMENTS: tl.constexpr, BLOCK_M: tl.constexpr, BATCH: tl.constexpr, GROUPS_PAD: tl.constexpr,
    PREPARED: tl.constexpr, COMPILED: tl.constexpr,
):  # fmt: skip
    """Grid `[N * SEGMENTS, blocks of M, blocks of BATCH rows]`: `h . centroid`, by segments."""
    M: tl.constexpr = HEAD.clusters
    D: tl.constexpr = HEAD.hidden_size
    group, segment = tl.program_id(0) // SEGMENTS, tl.program_id(0) % SEGMENTS
    num_groups = tl.num_programs(0) // SEGMENTS
    first_row = tl.program_id(2) * BATCH
    slots = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    real = slots < M
    values_ptr += group.to(tl.int64) * group_values
    scales_ptr += group.to(tl.int64) * group_scales
    if CENTROIDS is None:
        dots = float_dots(values_ptr, hidden_ptr, first_row, num_rows, slots, real, D, 32, BATCH)
    else:
        if not PREPARED:
            quantize_rows(hidden_ptr, words_ptr, hidden_scales_ptr, first_row, num_rows, D, BATCH,
                          GROUPS_PAD, CENTROIDS)  # fmt: skip
        words_ptr += first_row * (2 * CENTROIDS.groups * CENTROIDS.words)
        hidden_scales_ptr += first_row * (2 * CENTROIDS.groups)
        dots = segment_dots(values_ptr, scales_ptr, words_ptr, hidden_scales_ptr, slots, real,
                            segment, BATCH, CENTROIDS, COMPILED)  # fmt: skip
    for b in tl.static_range(BATCH):
        if first_row + b < num_rows:
            row = segment.to(tl.int64) * num_rows + first_row + b
            tl.store(dots_ptr + (row * num_groups + group) * M + slots, dots[b], mask=real)


@triton.jit
def summed_dots(
    dots_ptr, means_ptr, row, group, num_rows, num_groups, HEAD: tl.constexpr,
    SEGMENTS: tl.constexpr, PROJECTED: tl.constexpr,
):  # fmt: skip
    """`h . centroid` float32 `[clusters_pad]` of a row and group, from what `dots_kernel` left."""
    M: tl.constexpr = HEAD.clusters
    M_PAD: tl.constexpr = HEAD.clusters_pad
    slots = tl.arange(0, M_PAD)
    dots = tl.zeros([M_PAD], tl.float32)
    for segment in tl.static_range(SEGMENTS):
        part = (segment * num_rows + row).to(tl.int64) * num_groups + group
        dots += tl.load(dots_ptr + part * M + slots, mask=slots < M, other=0.0)
    if PROJECTED:
        dots += tl.load(means_ptr + row)
    return dots


@triton.jit(do_not_specialize=_UNSPECIALISED)
def candidates_kernel(
    hidden_ptr,  # [B, D]
    rows_ptr,  # [N, M, S, D]
    ids_ptr,  # int32 [N, M, S]
    dots_ptr,  # float32 [SEGMENTS, B, N, M]
    means_ptr,  # float32 [B] where PROJECTED
    spread_ptr,  # float32 [N, M]
    pinned_rows_ptr,  # [N, n, D]
    pinned_ids_ptr,  # int32 [N, n]
    keys_ptr,  # OUT: int64 [B, N * splits, best], then [B, N * splits]: parts
    sums_ptr,  # OUT: float32 [B, N * splits, 2]
    counters_ptr,  # int32 [B], 0 before and after
    out_keys_ptr,  # OUT: int64 [B, best], then [B]
    out_ids_ptr,  # OUT: int64 [B, best]
    out_logits_ptr,  # OUT: float32 [B, best]
    out_logsumexp_ptr,  # OUT: float32 [B]
    alpha, probes_a_split, HEAD: tl.constexpr, SEGMENTS: tl.constexpr, ROWS: tl.constexpr,
    PROJECTED: tl.constexpr, LOGSUMEXP: tl.constexpr, UNPROBED: tl.constexpr,
    PART_BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid `[N, splits, B]`: from centroid scores to the rank's best keys and log-sum-exp.

    Every split selects all probes of its group and scores its own share of them.
    """
    D: tl.constexpr = HEAD.hidden_size
    group, split, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_groups, num_splits, num_rows = tl.num_programs(0), tl.num_programs(1), tl.num_programs(2)
    dots = summed_dots(dots_ptr, means_ptr, row, group, num_rows, num_groups, HEAD, SEGMENTS,
                       PROJECTED)  # fmt: skip
    first = split * probes_a_split
    best, greatest, total, left = probe_group(
        dots, hidden_norm(hidden_ptr + row * D, D, HEAD.block_columns, ROWS), alpha, group,
        hidden_ptr + row * D, rows_ptr, ids_ptr, spread_ptr, pinned_rows_ptr, pinned_ids_ptr,
        first, tl.minimum(first + probes_a_split, HEAD.probes), HEAD, ROWS, LOGSUMEXP, UNPROBED,
    )  # fmt: skip
    num_parts = num_groups * num_splits
    write_part(row * num_parts + group * num_splits + split, num_rows * num_parts, best, greatest,
               total, left, keys_ptr, sums_ptr, LOGSUMEXP, UNPROBED)  # fmt: skip
    if arrive(counters_ptr + row, num_parts):
        reduce_parts(row, num_rows, num_parts, keys_ptr, sums_ptr, out_keys_ptr, out_ids_ptr,
                     out_logits_ptr, out_logsumexp_ptr, HEAD.best, PART_BLOCK, LOGSUMEXP,
                     UNPROBED)  # fmt: skip
