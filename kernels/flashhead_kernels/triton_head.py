"""The kernels of a FlashHead step: all in one launch, or centroid scores and candidates in two.

One launch: a program is a probing group and serves all rows of a small batch, so that it reads each
centroid once. Two launches: the centroids of a group are spread over programs, and a program of the
second launch is a group and a row, so that more programs share the work. Both run the same code on
the same blocks, and with integer centroids give the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flashhead_kernels.triton_pieces import noise_place
from flashhead_kernels.triton_reduce import (
    arrive,
    probe_group,
    reduce_parts,
    row_logits,
    write_part,
)
from flashhead_kernels.triton_scores import (
    float_dots,
    hidden_norm,
    integer_dots,
    quantize_hidden,
)


@triton.jit
def group_dots(
    probe_ptr, first_row, num_rows, values_ptr, scales_ptr, words_ptr, hidden_scales_ptr,
    slots, real_slots,
    HEAD: tl.constexpr, CENTROIDS: tl.constexpr, BATCH: tl.constexpr, BATCH_PAD: tl.constexpr,
    DP4A: tl.constexpr,
):  # fmt: skip
    """`h . centroid` float32 `[BATCH_PAD, slots]` of one group, for BATCH rows from first_row.

    probe_ptr: hidden states in the columns of the centroids. Rows past num_rows repeat the last.
    words_ptr, hidden_scales_ptr: memory for `quantize_hidden`, shared by the programs of these
    rows: all of them write the same there.
    """
    D: tl.constexpr = HEAD.hidden_size
    if CENTROIDS is None:
        dots = float_dots(values_ptr, probe_ptr, first_row, num_rows, slots, real_slots,
                          D, 32, BATCH, BATCH_PAD)  # fmt: skip
    else:
        for b in tl.static_range(BATCH):
            row = tl.minimum(first_row + b, num_rows - 1)
            state_ptr = probe_ptr + row * (CENTROIDS.groups * CENTROIDS.group_size)
            quantize_hidden(state_ptr, words_ptr, hidden_scales_ptr, b, CENTROIDS)
        tl.debug_barrier()
        dots = integer_dots(values_ptr, scales_ptr, words_ptr, hidden_scales_ptr, slots,
                            real_slots, BATCH, BATCH_PAD, CENTROIDS, DP4A)  # fmt: skip
    return dots


@triton.jit
def project_kernel(
    hidden_ptr, to_state_ptr, mean_ptr, coordinates_ptr, means_ptr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid `[B, blocks of COLUMNS]`: `projection.project_states`, a row and some columns a program.

    to_state_ptr: `[COLUMNS, D]`; coordinates_ptr: float32 `[B, COLUMNS]`; means_ptr: float32 `[B]`.
    What a program computes for its row does not depend on how many rows there are.
    """
    row, block = tl.program_id(0), tl.program_id(1)
    state_ptr = hidden_ptr + row * D
    column = block * BLOCK + tl.arange(0, BLOCK)
    real = column < COLUMNS
    found = row_logits(to_state_ptr, state_ptr, column.to(tl.int64), real, D, BLOCK_D)
    tl.store(coordinates_ptr + row * COLUMNS + column, found, mask=real)
    if block == 0:
        one = tl.arange(0, 1)
        mean = row_logits(mean_ptr, state_ptr, one.to(tl.int64), one < 1, D, BLOCK_D)
        tl.store(means_ptr + row + one, mean)


@triton.jit
def one_launch_kernel(
    hidden_ptr, probe_ptr, added_ptr, rows_ptr, ids_ptr, values_ptr, scales_ptr, spread_ptr,
    bias_ptr, cluster_bias_ptr, pinned_rows_ptr, pinned_ids_ptr, pinned_bias_ptr, positions_ptr,
    sequences_ptr, words_ptr, hidden_scales_ptr, keys_ptr, sums_ptr,
    counter_ptr, out_keys_ptr, out_logsumexp_ptr,
    alpha, inverse_temperature, softcap, seed,
    group_values, group_scales,
    HEAD: tl.constexpr, CENTROIDS: tl.constexpr, BATCH: tl.constexpr, BATCH_PAD: tl.constexpr,
    BIAS: tl.constexpr, SOFTCAP: tl.constexpr, SAMPLE: tl.constexpr, SEQUENCES: tl.constexpr,
    LOGSUMEXP: tl.constexpr, UNPROBED: tl.constexpr, PART_BLOCK: tl.constexpr,
    DP4A: tl.constexpr, PROJECTED: tl.constexpr,
):  # fmt: skip
    """Grid `[N]`. Everything from hidden states to the rank's best keys and log-sum-exp.

    probe_ptr, added_ptr: what `project_kernel` made; hidden_ptr and unused where not PROJECTED.

    group_values, group_scales: elements of `values`, `scales` a group.
    """
    M_PAD: tl.constexpr = HEAD.clusters_pad
    D: tl.constexpr = HEAD.hidden_size
    group = tl.program_id(0)
    num_groups = tl.num_programs(0)
    slots = tl.arange(0, M_PAD)
    dots = group_dots(
        probe_ptr, tl.zeros([], tl.int32), BATCH, values_ptr + group.to(tl.int64) * group_values,
        scales_ptr + group.to(tl.int64) * group_scales,
        words_ptr, hidden_scales_ptr, slots, slots < HEAD.clusters,
        HEAD, CENTROIDS, BATCH, BATCH_PAD, DP4A,
    )  # fmt: skip
    batch = tl.arange(0, BATCH_PAD)[:, None]
    for b in tl.range(0, BATCH):
        of_row = tl.sum(tl.where(batch == b, dots, 0.0), 0)
        if PROJECTED:
            of_row += tl.load(added_ptr + b)
        position, sequence = noise_place(positions_ptr, sequences_ptr, b, SAMPLE, SEQUENCES)
        best, greatest, total, left = probe_group(
            of_row,
            hidden_norm(hidden_ptr, b, D, HEAD.hidden_pad), alpha, group,
            hidden_ptr + b * D, rows_ptr, ids_ptr, spread_ptr, bias_ptr, cluster_bias_ptr,
            pinned_rows_ptr, pinned_ids_ptr, pinned_bias_ptr,
            inverse_temperature, softcap, seed, position, sequence,
            HEAD, BIAS, SOFTCAP, SAMPLE, LOGSUMEXP, UNPROBED,
        )  # fmt: skip
        write_part(b * num_groups + group, BATCH * num_groups, best, greatest, total, left,
                   keys_ptr, sums_ptr, LOGSUMEXP, UNPROBED)  # fmt: skip
    if arrive(counter_ptr, num_groups):
        for b in tl.range(0, BATCH):
            reduce_parts(b, BATCH, num_groups, keys_ptr, sums_ptr, out_keys_ptr,
                         out_logsumexp_ptr, HEAD.best, PART_BLOCK, LOGSUMEXP,
                         UNPROBED)  # fmt: skip


@triton.jit
def dots_kernel(
    probe_ptr, added_ptr, values_ptr, scales_ptr, words_ptr, hidden_scales_ptr, dots_ptr,
    num_rows, group_values, group_scales, block_words, block_scales,
    HEAD: tl.constexpr, CENTROIDS: tl.constexpr, BLOCK_M: tl.constexpr, BATCH: tl.constexpr,
    DP4A: tl.constexpr, PROJECTED: tl.constexpr,
):  # fmt: skip
    """Grid `[N, blocks of M, blocks of B]`: `h . centroid` into dots float32 `[B, N, M]`.

    block_words, block_scales: elements that `quantize_hidden` keeps for a block of B.
    """
    M: tl.constexpr = HEAD.clusters
    group, block = tl.program_id(0), tl.program_id(1)
    first_row = tl.program_id(2) * BATCH
    num_groups = tl.num_programs(0)
    slots = block * BLOCK_M + tl.arange(0, BLOCK_M)
    dots = group_dots(
        probe_ptr, first_row, num_rows, values_ptr + group.to(tl.int64) * group_values,
        scales_ptr + group.to(tl.int64) * group_scales,
        words_ptr + tl.program_id(2) * block_words,
        hidden_scales_ptr + tl.program_id(2) * block_scales,
        slots, slots < M, HEAD, CENTROIDS, BATCH, BATCH, DP4A,
    )  # fmt: skip
    rows = first_row + tl.arange(0, BATCH)[:, None]
    if PROJECTED:
        dots += tl.load(added_ptr + rows, mask=rows < num_rows, other=0.0)
    at = dots_ptr + (rows.to(tl.int64) * num_groups + group) * M + slots[None, :]
    tl.store(at, dots, mask=(rows < num_rows) & (slots < M)[None, :])


@triton.jit
def candidates_kernel(
    hidden_ptr, rows_ptr, ids_ptr, dots_ptr, spread_ptr, bias_ptr, cluster_bias_ptr,
    pinned_rows_ptr, pinned_ids_ptr, pinned_bias_ptr, positions_ptr, sequences_ptr,
    keys_ptr, sums_ptr, counters_ptr, out_keys_ptr, out_logsumexp_ptr,
    alpha, inverse_temperature, softcap, seed,
    HEAD: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr, SAMPLE: tl.constexpr,
    SEQUENCES: tl.constexpr, LOGSUMEXP: tl.constexpr, UNPROBED: tl.constexpr,
    PART_BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid `[N, B]`: from `dots [B, N, M]` to the rank's best keys and log-sum-exp."""
    M: tl.constexpr = HEAD.clusters
    M_PAD: tl.constexpr = HEAD.clusters_pad
    D: tl.constexpr = HEAD.hidden_size
    group, row = tl.program_id(0), tl.program_id(1)
    num_groups = tl.num_programs(0)
    slots = tl.arange(0, M_PAD)
    part = row * num_groups + group
    dots = tl.load(dots_ptr + part.to(tl.int64) * M + slots, mask=slots < M, other=0.0)
    position, sequence = noise_place(positions_ptr, sequences_ptr, row, SAMPLE, SEQUENCES)
    best, greatest, total, left = probe_group(
        dots, hidden_norm(hidden_ptr, row, D, HEAD.hidden_pad), alpha, group,
        hidden_ptr + row * D, rows_ptr, ids_ptr, spread_ptr, bias_ptr, cluster_bias_ptr,
        pinned_rows_ptr, pinned_ids_ptr, pinned_bias_ptr,
        inverse_temperature, softcap, seed, position, sequence,
        HEAD, BIAS, SOFTCAP, SAMPLE, LOGSUMEXP, UNPROBED,
    )  # fmt: skip
    num_rows = tl.num_programs(1)
    write_part(part, num_rows * num_groups, best, greatest, total, left, keys_ptr, sums_ptr,
               LOGSUMEXP, UNPROBED)  # fmt: skip
    if arrive(counters_ptr + row, num_groups):
        reduce_parts(row, num_rows, num_groups, keys_ptr, sums_ptr, out_keys_ptr,
                     out_logsumexp_ptr, HEAD.best, PART_BLOCK, LOGSUMEXP,
                     UNPROBED)  # fmt: skip
