"""The head's operations in plain torch: the definition that every kernel is tested against.

Shapes: `B` rows, `D` hidden size, `N` probing groups of `M` clusters of `S` tokens, `K = N * M`.
All arithmetic on logits is float32, whatever the dtype of the rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flashhead_kernels.keys import EMPTY_KEY, pack_keys
from flashhead_kernels.keys import unpack_keys as unpack_keys
from flashhead_kernels.keys import unpack_keys_into as unpack_keys_into
from flashhead_kernels.noise import PLAIN, FinalLogits
from flashhead_kernels.quantize import (
    QuantizedCentroids,
    project_states,
    quantize_hidden_states,
)
from flashhead_kernels.shard import (
    Candidates,
    IndexShard,
    Query,
    check_hidden_states,
    check_k,
    check_query,
)


def all_finite(hidden_states: Tensor) -> bool:
    """Whether no element of `hidden_states` is NaN or inf; waits for the device."""
    return bool(torch.isfinite(hidden_states).all())


def centroid_dots(hidden_states: Tensor, centroids: QuantizedCentroids) -> Tensor:
    """Return `h . centroid` as float32 `[B, N, M]`.

    Integer centroids meet hidden states rounded to int8 by scale group, so that a kernel may use
    integer dot products; 16-bit centroids meet the hidden states as they are. Centroids of fewer
    columns meet them in the coordinates of their projection, and the mean's part is added.
    """
    hidden = hidden_states.float()
    means = hidden.new_zeros(len(hidden))
    if centroids.projection is not None:
        hidden, means = project_states(hidden, centroids.projection)
    if centroids.bits != 16:
        integers, scales = quantize_hidden_states(hidden, centroids.group_size)
        hidden = integers * scales.repeat_interleave(centroids.group_size, dim=-1)
    dots = torch.einsum("bd,nmd->bnm", hidden, centroids.dequantize())
    return dots + means[:, None, None]


def score_centroids(hidden_states: Tensor, shard: IndexShard, alpha: float) -> Tensor:
    """Probing score `h . centroid + alpha * |h| * spread` as float32 `[B, N, M]`.

    The spread is -inf for a cluster of pads, which no row then prefers to a real one.
    """
    spread = shard.spread
    norms = torch.linalg.vector_norm(hidden_states.float(), dim=-1)
    scaled = alpha * norms[:, None, None] * spread
    # 0 * -inf is NaN: a cluster of pads stays at -inf whatever alpha is.
    lift = torch.where(torch.isneginf(spread), spread, scaled)
    return centroid_dots(hidden_states, shard.centroids) + lift


def select_probes(scores: Tensor, num_probes_per_group: int) -> Tensor:
    """Slots int32 `[B, N, p]` of each group's best `scores [B, N, M]`, ascending.

    Of equal scores the lower slot wins.
    """
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    return order[..., :num_probes_per_group].sort(dim=-1).values.to(torch.int32)


def score_rows(hidden_states: Tensor, rows: Tensor, cluster_ids: Tensor) -> Tensor:
    """Logits float32 `[B, n, S]` of the clusters `cluster_ids [B, n]` of `rows [K, S, D]`.

    A cluster id of -1 means no cluster and gives -inf.
    """
    batch, count = cluster_ids.shape
    logits = hidden_states.new_empty((batch, count, rows.shape[1]), dtype=torch.float32)
    for b in range(batch):
        chosen = rows[cluster_ids[b].clamp(min=0).long()].float()
        logits[b] = torch.einsum("d,nsd->ns", hidden_states[b].float(), chosen)
    return logits.masked_fill((cluster_ids < 0).unsqueeze(-1), float("-inf"))


def probed_candidates(
    hidden_states: Tensor, rows: Tensor, token_ids: Tensor, cluster_ids: Tensor, *, k: int = 1
) -> Tensor:
    """Best keys int64 `[B, k]` among the tokens of `cluster_ids [B, n]` (-1: none).

    rows: `[K, S, D]`; token_ids: int32 `[K, S]`, -1 for a pad.
    """
    logits = score_rows(hidden_states, rows, cluster_ids)
    ids = token_ids[cluster_ids.clamp(min=0).long()]
    ids = ids.masked_fill((cluster_ids < 0).unsqueeze(-1), -1)
    return best_keys(logits.flatten(1), ids.flatten(1), k)


def best_keys(logits: Tensor, token_ids: Tensor, k: int) -> Tensor:
    """The k greatest keys `[B, k]` of `logits [B, n]`, descending, filled with EMPTY_KEY."""
    keys = pack_keys(logits, token_ids)
    if keys.shape[1] < k:
        filler = keys.new_full((keys.shape[0], k - keys.shape[1]), EMPTY_KEY)
        keys = torch.cat([keys, filler], dim=1)
    return keys.topk(k, dim=1).values


def candidates(
    hidden_states: Tensor,
    shard: IndexShard,
    query: Query,
    *,
    between: Callable[[], object] | None = None,
) -> Candidates:
    """A rank's whole step of `hidden_states [B, D]`: score centroids, probe, score rows, reduce.

    The log-sum-exp is closed form: exact over probed and pinned tokens, and for every unprobed
    cluster `tokens * exp(h . mean)`, a lower bound of its mass by Jensen's inequality.

    between: called once when centroids are scored and before rows are, for a profiler; where it is
        None an implementation may do both in one.

    Raises:
        ValueError: see `check_query`.
    """
    check_query(hidden_states, shard, query)
    batch, clusters = hidden_states.shape[0], shard.rows.shape[1]
    scores = score_centroids(hidden_states, shard, query.alpha)
    if between is not None:
        between()
    probes = select_probes(scores, query.num_probes_per_group)
    first = torch.arange(len(shard.rows), device=probes.device, dtype=torch.int32) * clusters
    cluster_ids = (probes + first[None, :, None]).flatten(1)
    logits = score_rows(hidden_states, shard.cluster_rows, cluster_ids).flatten(1)
    ids = shard.cluster_token_ids[cluster_ids.long()].flatten(1)
    pinned = torch.einsum("bd,nqd->bnq", hidden_states.float(), shard.pinned_rows.float())
    logits = torch.cat([logits, pinned.flatten(1)], dim=1)
    ids = torch.cat([ids, shard.pinned_token_ids.flatten().expand(batch, -1)], dim=1)
    keys = best_keys(logits, ids, query.k)
    unprobed = best_unprobed(scores.flatten(1), cluster_ids) if query.need_unprobed else None
    if not query.need_logsumexp:
        return Candidates(keys, None, unprobed)
    means = centroid_dots(hidden_states, shard.centroids).flatten(1)
    closed = means + shard.num_tokens.flatten().float().log()
    closed = closed.scatter(1, cluster_ids.long(), float("-inf"))
    exact = logits.masked_fill(ids < 0, float("-inf"))
    return Candidates(keys, torch.cat([exact, closed], dim=1).logsumexp(1), unprobed)


def best_unprobed(scores: Tensor, cluster_ids: Tensor) -> Tensor:
    """Greatest key int64 `[B]` of `scores [B, K]` outside of `cluster_ids [B, n]`, with id 0."""
    keys = pack_keys(scores, torch.zeros_like(scores, dtype=torch.int64))
    return keys.scatter(1, cluster_ids.long(), EMPTY_KEY).amax(1)


def dense_candidates(
    hidden_states: Tensor,
    rows: Tensor,
    first_token_id: int,
    *,
    k: int = 1,
    need_logsumexp: bool = False,
    token_ids: Tensor | None = None,
    final: FinalLogits = PLAIN,
) -> Candidates:
    """Score every one of `rows [n, D]`, which hold tokens `first_token_id ...`, and reduce.

    token_ids: int32 `[n]`, -1 for a pad, where the rows hold these tokens instead. Keys hold final
    logits, the log-sum-exp those without noise.

    Raises:
        ValueError: shapes that do not fit, k below 1.
    """
    check_hidden_states(hidden_states, rows.shape[1])
    check_k(k)
    logits = hidden_states.float() @ rows.float().T
    logits = final.without_noise(logits)
    if token_ids is None:
        token_ids = torch.arange(rows.shape[0], device=rows.device) + first_token_id
    ids = token_ids.expand(logits.shape)
    keys = best_keys(final.with_noise(logits, ids), ids, k)
    exact = logits.masked_fill(ids < 0, float("-inf"))
    return Candidates(keys, exact.logsumexp(1) if need_logsumexp else None)
