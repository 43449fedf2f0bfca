"""`sampling` on CUDA: the kernels, and functions of the names and signatures that `sampling` has.

Nothing makes the host wait, and nothing is compiled anew for a batch size. Under TRITON_INTERPRET=1
the kernels run on CPU tensors.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashhead_kernels.cuda import (
    REGISTERS,
    ROWS_A_BLOCK,
    WARPS,
    centroid_dots,
    columns_a_block,
    dense_candidates,
    probing_scores,
    score_all,
    score_rows,
)
from flashhead_kernels.noise import Domain, FinalLogits, GumbelNoise
from flashhead_kernels.sampling import BELOW, HALF_WAY, LocalScores, Weighed
from flashhead_kernels.sampling import final_logits as final_logits
from flashhead_kernels.shard import IndexShard, Query
from flashhead_kernels.triton_reduce import (
    EMPTY_KEY,
    best_keys,
    gumbel_noise,
    hidden_norm,
    key_id,
    lse_add,
    noise_place,
    pack_key,
    row_logits,
    transform,
)
from flashhead_kernels.triton_shapes import (
    HeadShape,
    num_processors,
    on_device,
    power_of_two,
    signed_seed,
)

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
    noise = gumbel_noise(seed, position, sequence, numbers, DOMAIN)
    tl.store(noise_ptr + at, noise, mask=column < count)


@triton.jit
def best_candidate(
    best, logits_ptr, ids_ptr, columns, inside, seed, position, sequence
):  # fmt: skip
    """The greatest of key `best` and those of final logits with noise, where `inside`."""
    logits = tl.load(logits_ptr + columns, mask=inside, other=float("-inf"))
    ids = tl.load(ids_ptr + columns, mask=inside, other=-1)
    return tl.maximum(
        best, tl.max(pack_key(logits + gumbel_noise(seed, position, sequence, ids), ids), 0)
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
    value = gumbel_noise(seed, position, sequence, number, _GROUP)
    value = tl.sum(value, 0) + tl.load(group_log_mass_ptr + part)
    # Id 0 has the greatest key of a value: below the best candidate, no token of the group wins.
    if (value > float("-inf")) & (pack_key(value, tl.zeros([], tl.int32)) > best):
        slot = tl.arange(0, M_PAD)
        mass = tl.load(log_mass_ptr + part * M + slot, mask=slot < M, other=float("-inf"))
        mass += gumbel_noise(seed, position, sequence, number * M + slot, _CLUSTER)
        first_row = (group.to(tl.int64) * M + tl.argmax(mass, 0)) * S
        token = tl.arange(0, S_PAD)
        ids = tl.load(ids_ptr + first_row + token, mask=token < S, other=-1)
        logits = row_logits(rows_ptr, hidden_ptr + row * D, first_row + token, token < S, D,
                            BLOCK_D)  # fmt: skip
        logits = transform(logits, inverse_temperature, softcap, SOFTCAP)
        logits += gumbel_noise(seed, position, sequence, ids)
        chosen = tl.argmax(tl.where(ids >= 0, logits, float("-inf")), 0)
        best = tl.maximum(best, pack_key(value, tl.sum(tl.where(token == chosen, ids, 0), 0)))
    tl.store(keys_ptr + draw.to(tl.int64) * groups + group, best)


_BLOCK = 1024
"""Numbers that a program takes at a time."""
_PARTS = 32
"""Programs that share the candidates of a draw, at most."""
_PROGRAMS_A_PROCESSOR = 2


def local_scores(hidden_states: Tensor, shard: IndexShard, query: Query) -> LocalScores:
    """See `sampling.local_scores`."""
    (groups, _, tokens, _), batch = shard.rows.shape, len(hidden_states)
    probes, pinned = query.num_probes_per_group, shard.pinned_rows.shape[1]
    device, head = shard.rows.device, HeadShape.of(shard, query)
    block = max(1, ROWS_A_BLOCK // head.tokens_pad)
    hidden_states = hidden_states.contiguous()
    dots = centroid_dots(hidden_states, shard.centroids)
    width = groups * (probes * tokens + pinned)
    logits = torch.empty((batch, width), dtype=torch.float32, device=device)
    ids = torch.empty((batch, width), dtype=torch.int32, device=device)
    means = torch.empty_like(dots)
    if batch:
        wanted = _PROGRAMS_A_PROCESSOR * num_processors(device) // (groups * batch)
        shares = max(1, min(triton.cdiv(probes, block), wanted))
        with on_device(shard.rows):
            scores_kernel[(groups, batch, shares)](
                hidden_states, dots, shard.spread, shard.rows, shard.token_ids, shard.pinned_rows,
                shard.pinned_token_ids, logits, ids, means, float(query.alpha),
                HEAD=head, ROWS=ROWS_A_BLOCK, num_warps=WARPS, maxnreg=REGISTERS,
            )  # fmt: skip
    return LocalScores(logits, ids, means)


def dense_scores(hidden_states: Tensor, rows: Tensor, first_token_id: int) -> LocalScores:
    """See `sampling.dense_scores`."""
    device = rows.device
    last = first_token_id + len(rows)
    ids = torch.arange(first_token_id, last, dtype=torch.int32, device=device).unsqueeze(0)
    no_clusters = torch.empty((len(hidden_states), 0, 0), dtype=torch.float32, device=device)
    return LocalScores(score_all(hidden_states, rows), ids, no_clusters)


def every_logit(hidden_states: Tensor, rows: Tensor) -> Tensor:
    """See `sampling.every_logit`."""
    return score_all(hidden_states, rows.flatten(0, 2))


def cluster_log_mass(
    hidden_states: Tensor,
    shard: IndexShard,
    means: Tensor,
    scored: Tensor,
    shrinkage: float,
    final: FinalLogits,
) -> Tensor:
    """See `sampling.cluster_log_mass`."""
    (batch, groups, clusters), size = means.shape, hidden_states.shape[1]
    mass = torch.empty_like(means)
    if means.numel():
        with on_device(means):
            log_mass_kernel[(groups, batch)](
                hidden_states.contiguous(), means, shard.num_tokens, shard.spread,
                scored.contiguous(), mass, float(shrinkage), 1 / final.temperature,
                float(final.softcap),
                M=clusters, M_PAD=power_of_two(clusters), D=size, BLOCK_D=columns_a_block(size),
                ROWS=ROWS_A_BLOCK, SOFTCAP=final.softcap > 0, num_warps=WARPS,
            )  # fmt: skip
    return mass


def group_log_mass(log_mass: Tensor) -> Tensor:
    """See `sampling.group_log_mass`."""
    width = log_mass.shape[2]
    shape, device = log_mass.shape[:2], log_mass.device
    if log_mass.numel() == 0:
        return torch.full(shape, float("-inf"), dtype=torch.float32, device=device)
    sums = torch.empty(shape, dtype=torch.float32, device=device)
    with on_device(log_mass):
        log_sum_kernel[(sums.numel(),)](
            log_mass.contiguous(), sums, WIDTH=width, BLOCK=min(power_of_two(width), _BLOCK),
            num_warps=WARPS,
        )  # fmt: skip
    return sums


def draw_candidates(
    final: Tensor, token_ids: Tensor, row_of_draw: Tensor, noise: GumbelNoise
) -> Tensor:
    """See `sampling.draw_candidates`."""
    draws, width = len(row_of_draw), final.shape[1]
    parts = max(1, min(triton.cdiv(width, _BLOCK), _PARTS))
    keys = torch.empty((draws, parts), dtype=torch.int64, device=final.device)
    if draws:
        places, options = _places(noise)
        with on_device(final):
            draw_candidates_kernel[(draws, parts)](
                final.contiguous(), token_ids.contiguous(), row_of_draw, *places, keys,
                width, width if len(token_ids) > 1 else 0, signed_seed(noise.seed),
                **options, BLOCK=_BLOCK, num_warps=WARPS,
            )  # fmt: skip
    return keys.amax(1)


def draw_groups(
    hidden_states: Tensor,
    shard: IndexShard,
    weighed: Weighed,
    row_of_draw: Tensor,
    final: FinalLogits,
) -> Tensor:
    """See `sampling.draw_groups`."""
    groups, clusters, tokens, size = shard.rows.shape
    draws, width = len(row_of_draw), weighed.logits.shape[1] // groups
    keys = torch.empty((draws, groups), dtype=torch.int64, device=shard.rows.device)
    noise = final.noise
    assert noise is not None
    if draws:
        places, options = _places(noise)
        with on_device(shard.rows):
            draw_groups_kernel[(draws, groups)](
                hidden_states.contiguous(), weighed.logits.contiguous(), weighed.token_ids,
                weighed.log_mass.contiguous(), weighed.group_log_mass, shard.rows, shard.token_ids,
                shard.group_ids, row_of_draw, *places, keys,
                1 / final.temperature, float(final.softcap), signed_seed(noise.seed),
                M=clusters, M_PAD=power_of_two(clusters), S=tokens, S_PAD=power_of_two(tokens),
                WIDTH=width, BLOCK=min(power_of_two(width), _BLOCK),
                D=size, BLOCK_D=columns_a_block(size), SOFTCAP=final.softcap > 0, **options,
                num_warps=WARPS, maxnreg=REGISTERS,
            )  # fmt: skip
    return keys.amax(1)


def draw_dense(
    hidden_states: Tensor,
    rows: Tensor,
    first_token_id: int,
    token_ids: Tensor | None,
    final: FinalLogits,
) -> Tensor:
    """See `sampling.draw_dense`: one launch, and no logit is written to memory."""
    return dense_candidates(
        hidden_states, rows, first_token_id, token_ids=token_ids, final=final
    ).keys[:, 0]


def dense_log_mass(
    hidden_states: Tensor,
    rows: Tensor,
    token_ids: Tensor | None,
    own_rows: Tensor,
    final: FinalLogits,
) -> Tensor:
    """See `sampling.dense_log_mass`: one launch over all rows, and one over the tokens' own."""
    found = dense_candidates(
        hidden_states, rows, 0, need_logsumexp=True, token_ids=token_ids, final=final
    )
    assert found.logsumexp is not None
    own = score_rows(hidden_states, rows.unsqueeze(1), own_rows.unsqueeze(1))[:, 0, 0]
    own = final_logits(own, final).masked_fill(own_rows < 0, float("-inf"))
    return torch.stack([own, found.logsumexp], dim=1).double()


def gumbel(noise: GumbelNoise, token_ids: Tensor, domain: Domain = Domain.TOKEN) -> Tensor:
    """See `logits.gumbel`."""
    batch, count = token_ids.shape
    out = torch.empty((batch, count), dtype=torch.float32, device=token_ids.device)
    if out.numel():
        places, options = _places(noise)
        with on_device(out):
            noise_kernel[(batch, triton.cdiv(count, _BLOCK))](
                token_ids.contiguous(), *places, out, count, signed_seed(noise.seed),
                **options, DOMAIN=int(domain), BLOCK=_BLOCK, num_warps=WARPS,
            )  # fmt: skip
    return out


def some_or_all(chosen: Tensor) -> Tensor:
    """See `sampling.some_or_all`: all, since the host would wait for the number of some."""
    return torch.arange(len(chosen), device=chosen.device)


def _places(noise: GumbelNoise) -> tuple[tuple[Tensor, Tensor], dict[str, bool]]:
    """Positions and sequences as the kernels take them, and whether sequences are given."""
    sequences = noise.positions if noise.sequences is None else noise.sequences
    return (noise.positions, sequences), {"SEQUENCES": noise.sequences is not None}
