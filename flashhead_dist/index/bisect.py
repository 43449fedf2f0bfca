"""Balanced bisection: equal clusters in tree order by recursive median splits.

Every node of a level is split across its own principal direction so that both halves own their
share of the clusters. The nodes of a level differ by at most one row or one cluster, so each level
is a few batched products. Left and right are chosen so that a node's left half faces its left
neighbour: rows that are close in the final order are similar, which is what dealing clusters to
probing groups uses.

V rows: [V, D]. C clusters of at most S rows. The result is slots [C, S], -1 where a cluster is
short.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

POWER_ITERATIONS = 8
SAMPLE_ROWS = 8192
"""Rows that estimate the principal direction of a larger node."""
_GRAM_ROWS = 96
"""Below this size a node's Gram matrix is cheaper than its rows."""
_CHUNK_FLOATS = 4 * 1024 * 1024
"""Rows of one batch, kept small enough to stay in a CPU's last-level cache over the iterations."""


def bisect(
    vectors: Tensor,
    num_clusters: int,
    cluster_size: int,
    *,
    seed: int = 0,
    on_level: Callable[[int, int], None] = lambda level, levels: None,
) -> Tensor:
    """Return token slots `[C, S]` int64 in tree order; every row in exactly one slot, -1 elsewhere.

    vectors: `[V, D]` float32 with V <= C * S. Short clusters are spread evenly over the tree.
    on_level(level, levels): called after each level.
    """
    num_rows, hidden_size = vectors.shape
    if num_rows > num_clusters * cluster_size:
        raise ValueError(f"{num_rows} rows do not fit {num_clusters} clusters of {cluster_size}")
    device = vectors.device
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(hidden_size, generator=generator, dtype=torch.float32).to(device)
    order = torch.arange(num_rows, device=device)
    counts = torch.tensor([num_rows])
    clusters = torch.tensor([num_clusters])
    levels = max(1, (num_clusters - 1).bit_length())
    for level in range(levels):
        order = _split_level(vectors, order, counts, clusters, start)
        counts, clusters = _children(counts, clusters)
        on_level(level + 1, levels)
    return _slots(order, counts, cluster_size)


def _children(counts: Tensor, clusters: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and clusters of the next level's nodes; a node of one cluster stays as it is."""
    left_clusters = (clusters + 1) // 2
    left_counts = (counts * left_clusters) // clusters
    pairs_counts = torch.stack([left_counts, counts - left_counts], dim=1).flatten()
    pairs_clusters = torch.stack([left_clusters, clusters - left_clusters], dim=1).flatten()
    keep = pairs_clusters > 0
    return pairs_counts[keep], pairs_clusters[keep]


def _split_level(
    vectors: Tensor, order: Tensor, counts: Tensor, clusters: Tensor, start: Tensor
) -> Tensor:
    """Reorder the rows of every node so that its first child's rows come first."""
    device = vectors.device
    starts = torch.cumsum(counts, 0) - counts
    result = order.clone()
    facing = _facing(vectors, order, starts, counts)
    for count, nodes in _equal_nodes(counts, clusters):
        per_chunk = max(1, _CHUNK_FLOATS // (count * vectors.shape[1]))
        for chunk in torch.split(nodes, per_chunk):
            places = (starts[chunk, None] + torch.arange(count)).to(device)
            members = order[places]
            projection = _project(vectors[members], facing[chunk.to(device)], start)
            ranks = torch.argsort(projection, dim=1, stable=True)
            result[places] = members.gather(1, ranks)
    return result


def _equal_nodes(counts: Tensor, clusters: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield (rows, node indices) for each size that still has something to split."""
    for count in torch.unique(counts).tolist():
        nodes = torch.nonzero((counts == count) & (clusters > 1)).flatten()
        if count > 1 and len(nodes):
            yield count, nodes


def _facing(vectors: Tensor, order: Tensor, starts: Tensor, counts: Tensor) -> Tensor:
    """Direction `[nodes, D]` from each node's left neighbour to its right one."""
    nodes = len(counts)
    owner = torch.repeat_interleave(torch.arange(nodes), counts).to(order.device)
    sums = torch.zeros(nodes, vectors.shape[1], dtype=torch.float32, device=vectors.device)
    for rows in torch.split(torch.arange(len(order), device=order.device), 1 << 16):
        sums.index_add_(0, owner[rows], vectors[order[rows]])
    means = sums / counts.clamp(min=1).to(sums.device).unsqueeze(1)
    right = torch.cat([means[1:], means[-1:]])
    left = torch.cat([means[:1], means[:-1]])
    return right - left


def _project(members: Tensor, facing: Tensor, start: Tensor) -> Tensor:
    """Coordinates `[k, n]` of `members [k, n, D]` along each node's principal direction."""
    centred = members - members.mean(dim=1, keepdim=True)
    if members.shape[1] <= _GRAM_ROWS:
        gram = centred @ centred.transpose(1, 2)
        weights = (centred @ start).unsqueeze(2)
        for _ in range(POWER_ITERATIONS):
            weights = gram @ weights
            weights = weights / weights.norm(dim=1, keepdim=True).clamp(min=1e-30)
        direction = (weights.transpose(1, 2) @ centred).squeeze(1)
    else:
        step = -(-members.shape[1] // SAMPLE_ROWS)
        sample = centred[:, ::step]
        direction = start.expand(len(members), -1)
        for _ in range(POWER_ITERATIONS):
            along = sample @ direction.unsqueeze(2)
            direction = (along.transpose(1, 2) @ sample).squeeze(1)
            direction = direction / direction.norm(dim=1, keepdim=True).clamp(min=1e-30)
    sign = torch.where((direction * facing).sum(1, keepdim=True) < 0, -1.0, 1.0)
    return (centred @ (direction * sign).unsqueeze(2)).squeeze(2)


def _slots(order: Tensor, counts: Tensor, cluster_size: int) -> Tensor:
    """Token slots `[C, S]` from rows in tree order and the rows of each cluster."""
    counts = counts.to(order.device)
    slots = torch.full((len(counts), cluster_size), -1, dtype=torch.int64, device=order.device)
    owner = torch.repeat_interleave(torch.arange(len(counts), device=order.device), counts)
    first = torch.cumsum(counts, 0) - counts
    slots[owner, torch.arange(len(order), device=order.device) - first[owner]] = order
    return slots
