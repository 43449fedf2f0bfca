"""`sampling` on CUDA: the names and signatures, on Triton kernels.

Nothing makes the host wait, and nothing is compiled anew for a batch size. Under TRITON_INTERPRET=1
the kernels run on CPU tensors.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from flashhead_kernels.cuda import dense_candidates
from flashhead_kernels.logits import Domain, FinalLogits, GumbelNoise
from flashhead_kernels.sampling import LocalScores, Weighed, final_logits
from flashhead_kernels.shard import IndexShard, Query
from flashhead_kernels.triton_device import num_processors, on_device, signed_seed
from flashhead_kernels.triton_rows import (
    REGISTERS,
    ROWS_A_BLOCK,
    WARPS,
    centroid_dots,
    columns_a_block,
    score_all,
    score_rows,
)
from flashhead_kernels.triton_sampling import (
    draw_candidates_kernel,
    draw_groups_kernel,
    log_mass_kernel,
    log_sum_kernel,
    noise_kernel,
    scores_kernel,
)
from flashhead_kernels.triton_shapes import HeadShape, power_of_two

__all__ = [
    "cluster_log_mass",
    "dense_log_mass",
    "dense_scores",
    "draw_candidates",
    "draw_dense",
    "draw_groups",
    "every_logit",
    "final_logits",
    "group_log_mass",
    "gumbel",
    "local_scores",
    "some_or_all",
]

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
