"""The head's operations on a CPU: the names and signatures of `reference`, on compiled loops.

Rows and centroids are read once, in their stored precision, with float32 accumulation in an order
that depends on nothing but the hidden size. Work is shared over `torch.get_num_threads()` threads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashhead_kernels import cpu_loops as loops
from flashhead_kernels import reference
from flashhead_kernels.cpu_states import all_finite, flat, float_states, make_query, unpack_keys
from flashhead_kernels.cpu_threads import share
from flashhead_kernels.keys import EMPTY_KEY, unpack_keys_into
from flashhead_kernels.logits import PLAIN, FinalLogits
from flashhead_kernels.matmul_shortlist import BLOCK, matmul_is_faster, matmul_shortlist
from flashhead_kernels.reference import best_keys, select_probes
from flashhead_kernels.shard import (
    Candidates,
    IndexShard,
    Query,
    check_hidden_states,
    check_k,
    check_query,
)

__all__ = [
    "all_finite",
    "best_keys",
    "candidates",
    "dense_candidates",
    "probed_candidates",
    "score_centroids",
    "score_rows",
    "select_probes",
    "unpack_keys",
    "unpack_keys_into",
]


def score_centroids(hidden_states: Tensor, shard: IndexShard, alpha: float) -> Tensor:
    """See `reference.score_centroids`."""
    (groups, clusters), centroids = shard.spread.shape, shard.centroids
    batch = len(hidden_states)
    query, values, scales, bias = make_query(hidden_states, centroids, alpha)
    scores = np.empty(batch * groups * clusters, np.float32)
    if batch:
        spread = flat(shard.spread)
        share(
            groups,
            lambda first, last: loops.score_groups(
                first, last, query, batch, values, scales, centroids.group_size,
                centroids.tile, spread, bias, clusters, scores[first * clusters :],
                groups * clusters,
            ),
        )  # fmt: skip
    return torch.from_numpy(scores).view(batch, groups, clusters)


def score_rows(hidden_states: Tensor, rows: Tensor, cluster_ids: Tensor) -> Tensor:
    """See `reference.score_rows`."""
    token_ids = torch.zeros(rows.shape[:2], dtype=torch.int32)
    return _scan(hidden_states, rows, token_ids, cluster_ids, 1)[1]


def probed_candidates(
    hidden_states: Tensor, rows: Tensor, token_ids: Tensor, cluster_ids: Tensor, *, k: int = 1
) -> Tensor:
    """See `reference.probed_candidates`."""
    keys, _ = _scan(hidden_states, rows, token_ids, cluster_ids, k)
    return _greatest(keys.flatten(1), k)


def _scan(
    hidden_states: Tensor, rows: Tensor, token_ids: Tensor, cluster_ids: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    batch, count = cluster_ids.shape
    tokens, size = rows.shape[1:]
    best = np.full(batch * count * k, EMPTY_KEY, np.int64)
    logits = np.full(batch * count * tokens, -np.inf, np.float32)
    if batch * count:
        states, flat_rows, ids = float_states(hidden_states), flat(rows), flat(token_ids)
        clusters = flat(cluster_ids.to(torch.int64).contiguous())
        share(
            batch * count,
            lambda first, last: loops.scan_clusters(
                first, last, flat_rows, ids, tokens, states, batch, size, clusters, k, best, logits
            ),
        )
    return (
        torch.from_numpy(best).view(batch, count, k),
        torch.from_numpy(logits).view(batch, count, tokens),
    )


def candidates(
    hidden_states: Tensor,
    shard: IndexShard,
    query: Query,
    *,
    between: Callable[[], object] | None = None,
) -> Candidates:
    """See `reference.candidates`."""
    check_query(hidden_states, shard, query)
    groups, clusters, tokens, size = shard.rows.shape
    batch, k, centroids = hidden_states.shape[0], query.k, shard.centroids
    best = np.empty(groups * batch * k, np.int64)
    peak, mass = np.empty((2, groups * batch), np.float32)
    left = np.empty(groups * batch * query.need_unprobed, np.int64)
    if batch:
        states, values, scales, bias = make_query(hidden_states, centroids, query.alpha)
        spread = flat(shard.spread)
        of_centroids = (values, scales, centroids.group_size, centroids.tile, spread)
        of_rows = (
            query.num_probes_per_group, flat(shard.rows), flat(shard.token_ids), tokens,
            flat(shard.pinned_rows), flat(shard.pinned_token_ids), shard.pinned_rows.shape[1], k,
            query.need_logsumexp,
        )  # fmt: skip
        if between is None:
            share(
                groups,
                lambda first, last: loops.probe_groups(
                    first, last, states, batch, size, *of_centroids, bias, clusters, *of_rows, best,
                    peak, mass, left,
                ),
            )  # fmt: skip
        else:
            stride = groups * clusters
            scores = np.empty(batch * stride, np.float32)
            share(
                groups,
                lambda first, last: loops.score_groups(
                    first, last, states, batch, *of_centroids, bias, clusters,
                    scores[first * clusters :], stride,
                ),
            )  # fmt: skip
            between()
            share(
                groups,
                lambda first, last: loops.scan_best_groups(
                    first, last, states, batch, size, spread, bias, clusters, *of_rows,
                    scores[first * clusters :], stride, best, peak, mass, left,
                ),
            )  # fmt: skip
    found = _merge(best, peak, mass, batch, k, query.need_logsumexp)
    if not query.need_unprobed:
        return found
    unprobed = np.empty((batch, 1), np.int64)
    loops.merge_keys(left, unprobed)
    return replace(found, unprobed=torch.from_numpy(unprobed)[:, 0])


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
    """See `reference.dense_candidates`, which final logits are left to.

    A large batch goes through the matrix library first, where that is faster: its logits, rounded
    to the rows' dtype, only choose the rows that are then scored exactly.
    """
    if not final.is_plain:
        return reference.dense_candidates(
            hidden_states, rows, first_token_id, k=k, need_logsumexp=need_logsumexp,
            token_ids=token_ids, final=final,
        )  # fmt: skip
    count, size = rows.shape
    check_hidden_states(hidden_states, size)
    check_k(k)
    whole = count - count % BLOCK
    if not need_logsumexp and matmul_is_faster(hidden_states, rows):
        blocks_of_rows = rows[:whole].view(-1, BLOCK, size)
        ids = token_ids
        if ids is None:
            ids = torch.arange(first_token_id, first_token_id + count, dtype=torch.int32)
        pads = None if token_ids is None else (token_ids[:whole] < 0).nonzero()[:, 0]
        cluster_ids = matmul_shortlist(hidden_states, rows[:whole], k, pads)
        if cluster_ids is not None:
            keys = probed_candidates(
                hidden_states, blocks_of_rows, ids[:whole].view(-1, BLOCK), cluster_ids, k=k
            )
            rest = _scan_dense(hidden_states, rows[whole:], ids[whole:], 0, k, False)
            return Candidates(_greatest(torch.cat([keys, rest.keys], dim=1), k), None)
    ids = hidden_states.new_empty(0, dtype=torch.int32) if token_ids is None else token_ids
    return _scan_dense(hidden_states, rows, ids, first_token_id, k, need_logsumexp)


def _scan_dense(
    hidden_states: Tensor,
    rows: Tensor,
    token_ids: Tensor,
    first_token_id: int,
    k: int,
    need_logsumexp: bool,
) -> Candidates:
    """token_ids: of the rows, or empty where they count up from first_token_id."""
    count, size = rows.shape
    batch, blocks = hidden_states.shape[0], -(-count // loops.ROW_BLOCK)
    best = np.empty(blocks * batch * k, np.int64)
    peak, mass = np.empty((2, blocks * batch), np.float32)
    if batch:
        states, flat_rows, ids = float_states(hidden_states), flat(rows), flat(token_ids)
        share(
            blocks,
            lambda first, last: loops.scan_dense(
                first, last, flat_rows, count, states, batch, size, ids, first_token_id, k,
                need_logsumexp, best, peak, mass,
            ),
        )  # fmt: skip
    return _merge(best, peak, mass, batch, k, need_logsumexp)


def _merge(
    best: np.ndarray[Any, Any],
    peak: np.ndarray[Any, Any],
    mass: np.ndarray[Any, Any],
    batch: int,
    k: int,
    need_logsumexp: bool,
) -> Candidates:
    """Reduce flat partial results `[parts, B, ...]` over their parts, in order."""
    merged = np.empty((batch, k), np.int64)
    loops.merge_keys(best, merged)
    keys = torch.from_numpy(merged)
    if not need_logsumexp:
        return Candidates(keys, None)
    if batch == 0:
        return Candidates(keys, torch.empty(0))
    peaks = torch.from_numpy(peak).view(-1, batch).double()
    masses = torch.from_numpy(mass).view(-1, batch).double()
    return Candidates(keys, (peaks + masses.log()).logsumexp(0).float())


def _greatest(keys: Tensor, k: int) -> Tensor:
    if keys.shape[1] < k:
        filler = keys.new_full((keys.shape[0], k - keys.shape[1]), EMPTY_KEY)
        keys = torch.cat([keys, filler], dim=1)
    return keys.amax(1, keepdim=True) if k == 1 else keys.topk(k, dim=1).values
