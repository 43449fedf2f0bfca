"""The kernels of sampling: what a rank knows of its groups, what their clusters weigh, and draws.

A program is a probing group and a row or draw, so that what it computes does not depend on the
groups beside it: draws are the same however groups are split over ranks. `cuda_sampling` launches
them; `sampling` says what they compute. Letters as there.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flashhead_kernels.logits import Domain
from flashhead_kernels.sampling import BELOW, HALF_WAY
from flashhead_kernels.triton_pieces import (
    EMPTY_KEY,
    best_keys,
    gumbel,
    key_id,
    lse_add,
    noise_place,
    pack_key,
    transform,
)
from flashhead_kernels.triton_reduce import row_logits
from flashhead_kernels.triton_rows import probing_scores
from flashhead_kernels.triton_scores import hidden_norm

_BELOW = tl.constexpr(BELOW)
_HALF_WAY = tl.constexpr(HALF_WAY)
_GROUP = tl.constexpr(int(Domain.GROUP))
_CLUSTER = tl.constexpr(int(Domain.CLUSTER))


@triton.jit
def scores_kernel(
    hidden_ptr, dots_ptr, spread_ptr, rows_ptr, ids_ptr, pinned_rows_ptr, pinned_ids_ptr,
    logits_ptr, out_ids_ptr, means_ptr, alpha,
    HEAD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Grid `[N, B, shares]`: all that `LocalScores` holds, from `dots [B, N, M]`.

    Each share repeats the cheap choice of probes and scores every shares-th block of them; the
    first writes the means. logits_ptr: float32, out_ids_ptr: int32, `[B, N, p * S + pinned]`.
    """
    M: tl.constexpr = HEAD.clusters
    M_PAD: tl.constexpr = HEAD.clusters_pad
    S: tl.constexpr = HEAD.tokens
    S_PAD: tl.constexpr = HEAD.tokens_pad
    PROBES: tl.constexpr = HEAD.probes
    PROBES_PAD: tl.constexpr = HEAD.probes_pad
    BLOCK: tl.constexpr = ROWS // S_PAD if ROWS > S_PAD else 1
    D: tl.constexpr = HEAD.hidden_size
    WIDTH: tl.constexpr = PROBES * S + HEAD.pinned
    group, row = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    share, shares = tl.program_id(2), tl.num_programs(2)
    part = row * tl.num_programs(0) + group
    slots = tl.arange(0, M_PAD)
    real = slots < M
    dots = tl.load(dots_ptr + part * M + slots, mask=real, other=0.0)
    spread = tl.load(spread_ptr + group * M + slots, mask=real, other=float("-inf"))
    norm = hidden_norm(hidden_ptr + row * D, D, HEAD.block_columns, ROWS)
    order = pack_key(probing_scores(dots, spread, norm, alpha), tl.where(real, slots, -1))
    top = best_keys(order, PROBES_PAD)
    rank = tl.arange(0, PROBES_PAD)
    probed = tl.sort(tl.where(rank < PROBES, key_id(top), M_PAD))
    if share == 0:
        # Keys are distinct: what is not probed lies below the last that is.
        last = tl.min(tl.where(rank < PROBES, top, 2**63 - 1), 0)
        shut = (order < last) & (spread > float("-inf"))
        tl.store(means_ptr + part * M + slots, tl.where(shut, dots, float("-inf")), mask=real)
    token = tl.arange(0, S_PAD)[None, :]
    for first in tl.range(share * BLOCK, PROBES, shares * BLOCK):
        place = first + tl.arange(0, BLOCK)
        slot = tl.gather(probed, tl.minimum(place, PROBES_PAD - 1), 0)
        at = tl.reshape((group * M + slot)[:, None] * S + token, [BLOCK * S_PAD])
        chosen = tl.reshape((place < PROBES)[:, None] & (token < S), [BLOCK * S_PAD])
        out = part * WIDTH + tl.reshape(place[:, None] * S + token, [BLOCK * S_PAD])
        _keep(rows_ptr, ids_ptr, hidden_ptr + row * D, logits_ptr, out_ids_ptr, at, out, chosen,
              D, HEAD.block_columns)  # fmt: skip
    for first in tl.range(share * ROWS, HEAD.pinned, shares * ROWS):
        place = first + tl.arange(0, ROWS)
        at = group * HEAD.pinned + place
        out = part * WIDTH + PROBES * S + place
        _keep(pinned_rows_ptr, pinned_ids_ptr, hidden_ptr + row * D, logits_ptr, out_ids_ptr, at,
              out, place < HEAD.pinned, D, HEAD.block_columns)  # fmt: skip


@triton.jit
def _keep(
    rows_ptr, ids_ptr, hidden_ptr, logits_ptr, out_ids_ptr, at, out, chosen,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Score rows `at` where `chosen`, and keep logits and ids as `out`; pads have -inf."""
    ids = tl.load(ids_ptr + at, mask=chosen, other=-1)
    logits = row_logits(rows_ptr, hidden_ptr, at, chosen, D, BLOCK_D)
    tl.store(logits_ptr + out, tl.where(ids >= 0, logits, float("-inf")), mask=chosen)
    tl.store(out_ids_ptr + out, ids, mask=chosen)


@triton.jit
def log_mass_kernel(
    hidden_ptr, means_ptr, num_tokens_ptr, spread_ptr, scored_ptr, mass_ptr,
    shrinkage, inverse_temperature, softcap,
    M: tl.constexpr, M_PAD: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Grid `[N, B]`: `sampling.cluster_log_mass`, float32 `[B, N, M]`."""
    group, row = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    part = row * tl.num_programs(0) + group
    slot = tl.arange(0, M_PAD)
    real = slot < M
    means = tl.load(means_ptr + part * M + slot, mask=real, other=float("-inf"))
    counts = tl.load(num_tokens_ptr + group * M + slot, mask=real, other=0)
    spread = tl.load(spread_ptr + group * M + slot, mask=real, other=0.0)
    shut = (means > float("-inf")) & (counts > 0)
    # No infinity enters the sums: where nothing is to be estimated, anything finite will do.
    means = tl.where(shut, means, 0.0)
    norm = hidden_norm(hidden_ptr + row * D, D, BLOCK_D, ROWS)
    x = norm * tl.maximum(spread, 0.0) * inverse_temperature
    if SOFTCAP:
        tangent = transform(means, 1.0 / softcap, softcap, SOFTCAP)
        x *= 1.0 - tangent * tangent
    estimate = transform(means, inverse_temperature, softcap, SOFTCAP)
    estimate += tl.log(tl.where(shut, counts, 1).to(tl.float32))
    gap = tl.maximum(tl.load(scored_ptr + part) - _BELOW - estimate, 0.0)
    mass = estimate + shrinkage * x / (x + _HALF_WAY) * gap
    tl.store(mass_ptr + part * M + slot, tl.where(shut, mass, float("-inf")), mask=real)


@triton.jit
def log_sum_kernel(values_ptr, sums_ptr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Grid `[n]`: log-sum-exp float32 `[n]` of `values [n, WIDTH]`."""
    row = tl.program_id(0).to(tl.int64)
    greatest = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    for first in tl.range(0, WIDTH, BLOCK):
        column = first + tl.arange(0, BLOCK)
        values = tl.load(
            values_ptr + row * WIDTH + column, mask=column < WIDTH, other=float("-inf")
        )
        greatest, total = lse_add(greatest, total, values)
    tl.store(sums_ptr + row, greatest + tl.log(total))


@triton.jit(do_not_specialize=["count", "seed"])
def noise_kernel(
    numbers_ptr, positions_ptr, sequences_ptr, noise_ptr, count, seed: tl.int64,
    SEQUENCES: tl.constexpr, DOMAIN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid `[B, blocks of n]`: `logits.gumbel` float32 of `numbers [B, n]`, count = n."""
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = row.to(tl.int64) * count + column
    numbers = tl.load(numbers_ptr + at, mask=column < count, other=0).to(tl.int32)
    position, sequence = noise_place(positions_ptr, sequences_ptr, row, True, SEQUENCES)
    noise = gumbel(seed, position, sequence, numbers, DOMAIN)
    tl.store(noise_ptr + at, noise, mask=column < count)


@triton.jit
def best_candidate(
    best, logits_ptr, ids_ptr, columns, inside, seed, position, sequence
):  # fmt: skip
    """The greatest of key `best` and those of final logits with noise, where `inside`."""
    logits = tl.load(logits_ptr + columns, mask=inside, other=float("-inf"))
    ids = tl.load(ids_ptr + columns, mask=inside, other=-1)
    return tl.maximum(
        best, tl.max(pack_key(logits + gumbel(seed, position, sequence, ids), ids), 0)
    )


@triton.jit(do_not_specialize=["width", "ids_stride", "seed"])
def draw_candidates_kernel(
    logits_ptr, ids_ptr, row_of_draw_ptr, positions_ptr, sequences_ptr, keys_ptr,
    width, ids_stride, seed: tl.int64,
    SEQUENCES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid `[n, parts]`: each part's greatest key int64 `[n, parts]`; see `draw_candidates`.

    width: R; ids_stride: of `token_ids`, 0 where all rows have the same.
    """
    draw, part, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    row = tl.load(row_of_draw_ptr + draw)
    position, sequence = noise_place(positions_ptr, sequences_ptr, draw, True, SEQUENCES)
    best = tl.full([], EMPTY_KEY, tl.int64)
    for first in tl.range(part * BLOCK, width, parts * BLOCK):
        column = first + tl.arange(0, BLOCK)
        best = best_candidate(best, logits_ptr + row * width, ids_ptr + row * ids_stride, column,
                              column < width, seed, position, sequence)  # fmt: skip
    tl.store(keys_ptr + draw.to(tl.int64) * parts + part, best)


@triton.jit(do_not_specialize=["seed"])
def draw_groups_kernel(
    hidden_ptr, logits_ptr, candidate_ids_ptr, log_mass_ptr, group_log_mass_ptr,
    rows_ptr, ids_ptr, group_ids_ptr, row_of_draw_ptr, positions_ptr, sequences_ptr, keys_ptr,
    inverse_temperature, softcap, seed: tl.int64,
    M: tl.constexpr, M_PAD: tl.constexpr, S: tl.constexpr, S_PAD: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    SOFTCAP: tl.constexpr, SEQUENCES: tl.constexpr,
):  # fmt: skip
    """Grid `[n, N]`: each group's greatest key int64 `[n, N]`; see `sampling.draw_groups`.

    logits_ptr, candidate_ids_ptr: `[B, N, WIDTH]`.
    """
    draw, group, groups = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    row = tl.load(row_of_draw_ptr + draw)
    part = row * groups + group
    position, sequence = noise_place(positions_ptr, sequences_ptr, draw, True, SEQUENCES)
    best = tl.full([], EMPTY_KEY, tl.int64)
    for first in tl.range(0, WIDTH, BLOCK):
        column = first + tl.arange(0, BLOCK)
        best = best_candidate(best, logits_ptr + part * WIDTH, candidate_ids_ptr + part * WIDTH,
                              column, column < WIDTH, seed, position, sequence)  # fmt: skip
    number = tl.load(group_ids_ptr + group + tl.arange(0, 1)).to(tl.int32)
    value = gumbel(seed, position, sequence, number, _GROUP)
    value = tl.sum(value, 0) + tl.load(group_log_mass_ptr + part)
    # Id 0 has the greatest key of a value: below the best candidate, no token of the group wins.
    if (value > float("-inf")) & (pack_key(value, tl.zeros([], tl.int32)) > best):
        slot = tl.arange(0, M_PAD)
        mass = tl.load(log_mass_ptr + part * M + slot, mask=slot < M, other=float("-inf"))
        mass += gumbel(seed, position, sequence, number * M + slot, _CLUSTER)
        first_row = (group.to(tl.int64) * M + tl.argmax(mass, 0)) * S
        token = tl.arange(0, S_PAD)
        ids = tl.load(ids_ptr + first_row + token, mask=token < S, other=-1)
        logits = row_logits(rows_ptr, hidden_ptr + row * D, first_row + token, token < S, D,
                            BLOCK_D)  # fmt: skip
        logits = transform(logits, inverse_temperature, softcap, SOFTCAP)
        logits += gumbel(seed, position, sequence, ids)
        chosen = tl.argmax(tl.where(ids >= 0, logits, float("-inf")), 0)
        best = tl.maximum(best, pack_key(value, tl.sum(tl.where(token == chosen, ids, 0), 0)))
    tl.store(keys_ptr + draw.to(tl.int64) * groups + group, best)
