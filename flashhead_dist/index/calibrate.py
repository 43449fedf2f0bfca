"""Fidelity of an index on hidden states, and the alpha that serves the worst text best.

A state is *found* where the dense argmax is pinned or in a cluster that its group probes. N states
[N, D], output embedding [V, D], index of G groups of M clusters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flashhead_dist.states import HiddenStates
from flashhead_kernels.cpu import dense_candidates, matmul_is_faster, unpack_keys
from flashhead_kernels.quantize import QuantizedCentroids
from flashhead_kernels.reference import centroid_dots
from flashhead_kernels.shard import IndexShard

_CHUNK_STATES = 2048
_BATCH_STATES = 256
_CHUNK_TOKENS = 32768

Advance = Callable[[float], None]


@dataclass(frozen=True)
class Found:
    """Share of states whose dense argmax is among the candidates."""

    overall: float
    by_source: dict[str, float]

    @property
    def worst_source(self) -> str:
        return min(self.by_source, key=lambda source: self.by_source[source])

    @property
    def worst(self) -> float:
        return self.by_source[self.worst_source]


def dense_argmax(weights: Tensor, states: Tensor, advance: Advance = lambda share: None) -> Tensor:
    """Token int64 `[N]` with the greatest float32 logit; of equal logits the smallest id.

    weights: `[V, D]`, any floating dtype.
    advance: called with the share of the work just done.
    """
    hidden = states.to(weights.device)
    if weights.device.type == "cpu" and matmul_is_faster(hidden[:_BATCH_STATES], weights):
        tokens = []
        for batch in torch.split(hidden, _BATCH_STATES):
            tokens.append(unpack_keys(dense_candidates(batch, weights, 0).keys)[1][:, 0])
            advance(len(batch) / len(hidden))
        return torch.cat(tokens)
    hidden = hidden.float()
    best = torch.full((len(hidden),), float("-inf"), dtype=torch.float32, device=weights.device)
    token = torch.zeros(len(hidden), dtype=torch.int64, device=weights.device)
    for start in range(0, len(weights), _CHUNK_TOKENS):
        rows = weights[start : start + _CHUNK_TOKENS].float().T
        for first in range(0, len(hidden), _CHUNK_STATES):
            part = slice(first, first + _CHUNK_STATES)
            logit, place = (hidden[part] @ rows).max(1)
            better = logit > best[part]
            best[part] = torch.where(better, logit, best[part])
            token[part] = torch.where(better, place + start, token[part])
        advance(rows.shape[1] / len(weights))
    return token


def probe_ranks(
    tensors: IndexShard,
    states: Tensor,
    tokens: Tensor,
    alphas: Sequence[float],
    advance: Advance = lambda share: None,
) -> Tensor:
    """How many clusters of its group go before that of each of `tokens [N]`: int64 `[alphas, N]`.

    A token is a candidate with p probes a group if and only if its number is below p; a pinned
    token has -1. Ties go to the lower slot, as in `select_probes`.
    """
    num_groups, clusters, _ = tensors.token_ids.shape
    device = tensors.token_ids.device
    home = _home_clusters(tensors.token_ids, int(tokens.max()) if len(tokens) else 0)[
        tokens.to(device)
    ]
    group_of = torch.where(home < 0, -1, home // clusters)
    slots = torch.arange(clusters, device=device)
    ranks = torch.full((len(alphas), len(states)), -1, dtype=torch.int64, device=device)
    for group in range(num_groups):
        members = torch.nonzero(group_of == group).flatten()
        centroids, spread = _one_group(tensors.centroids, group), tensors.spread[group]
        for part in torch.split(members, _CHUNK_STATES):
            hidden = states[part.to(states.device)].to(device).float()
            dots = centroid_dots(hidden, centroids).squeeze(1)
            norms = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True)
            own = (home[part] % clusters).unsqueeze(1)
            for index, alpha in enumerate(alphas):
                scores = dots + torch.where(torch.isneginf(spread), spread, alpha * norms * spread)
                mine = scores.gather(1, own)
                before = (scores > mine) | ((scores == mine) & (slots < own))
                ranks[index, part] = before.sum(1)
        advance(1 / num_groups)
    return ranks


def found_within(ranks: Tensor, probes_per_group: int, states: HiddenStates) -> Found:
    """Fidelity on `states` of N from `ranks [N]` of their dense argmax."""
    found = (ranks < probes_per_group).cpu()
    by_source = {}
    for index, source in enumerate(states.sources):
        of_source = found[states.source_ids == index]
        if len(of_source):
            by_source[source] = float(of_source.double().mean())
    return Found(float(found.double().mean()), by_source)


def choose_alpha(candidates: dict[float, Found]) -> float:
    """The alpha whose worst source does best, then the best overall, then the smallest."""
    return max(candidates, key=lambda a: (candidates[a].worst, candidates[a].overall, -a))


def missed_tokens(ranks: Tensor, tokens: Tensor, probes_per_group: int, limit: int) -> list[int]:
    """Up to `limit` token ids that states miss most often, ascending.

    ranks, tokens: `[N]` of N calibration states, as in `probe_ranks`. Counted are states that half
    of `probes_per_group` would miss, then those that a quarter would: other texts miss more than
    the ones that shaped the index.
    """
    chosen: dict[int, None] = {}
    for share in (2, 4):
        missed = tokens[(ranks >= -(-probes_per_group // share)).to(tokens.device)]
        ids, counts = torch.unique(missed, return_counts=True)
        often = ids[torch.argsort(counts, descending=True, stable=True)].tolist()
        chosen |= dict.fromkeys(often)
    return sorted(list(chosen)[:limit])


def _home_clusters(token_ids: Tensor, highest: int) -> Tensor:
    """Cluster `g * M + m` of each token up to the highest that occurs, -1 for none (pinned)."""
    flat = token_ids.flatten().long()
    size = max(highest, int(flat.max())) + 1
    home = torch.full((size,), -1, dtype=torch.int64, device=token_ids.device)
    real = flat >= 0
    cluster = torch.arange(len(flat), device=token_ids.device) // token_ids.shape[-1]
    home[flat[real]] = cluster[real]
    return home


def _one_group(centroids: QuantizedCentroids, group: int) -> QuantizedCentroids:
    """Centroids with leading shape `[1, M]`."""
    one = slice(group, group + 1)
    scales = None if centroids.scales is None else centroids.scales[one]
    return replace(centroids, values=centroids.values[one], scales=scales)
