"""Clusters of every size from one tree: halves of clusters, and neighbours put together.

Clustering takes minutes and its halves and unions seconds. C clusters of S slots, in tree order.
"""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

_LARGEST = 8
_CHUNK_CLUSTERS = 8192


def resize(slots: Tensor, vectors: Tensor, cluster_size: int) -> Tensor:
    """Slots `[C * S / cluster_size, cluster_size]` in tree order, from `slots [C, S]`.

    vectors: `[V, D]`, rows in the metric that clusters form in. Larger clusters are neighbours in
    the tree, a smaller one is the better half of one; both sizes are powers of two.

    Raises:
        ValueError: clusters that do not pair up evenly.
    """
    while slots.shape[1] > cluster_size:
        slots = halve(slots, vectors)
    if slots.shape[1] == cluster_size:
        return slots
    count = cluster_size // slots.shape[1]
    if len(slots) % count:
        raise ValueError(f"{len(slots)} clusters do not make unions of {count}")
    return slots.reshape(-1, cluster_size)


def halve(slots: Tensor, vectors: Tensor) -> Tensor:
    """Divide each cluster in two halves of least summed squared distance to their means.

    Returns slots `[2C, S / 2]`; the halves of a cluster are neighbours. A pad, -1, counts as a row
    at the mean of all rows, as in `index.refine`.

    Raises:
        ValueError: S above 8, of which there are too many halves.
    """
    count, size = slots.shape
    if size > _LARGEST:
        raise ValueError(f"clusters of {size} have too many halves")
    orders = _divisions(size).to(slots.device)
    halves = torch.empty_like(slots)
    for part in torch.split(torch.arange(count, device=slots.device), _CHUNK_CLUSTERS):
        ids = slots[part]
        rows = torch.index_select(vectors, 0, ids.clamp(min=0).flatten())
        rows = rows.view(*ids.shape, -1) * (ids >= 0).unsqueeze(2)
        gram = rows @ rows.transpose(1, 2)
        # The fall of the distance is linear in the Gram matrix: see `index.divide`.
        gains = sum(
            gram[:, half[:, :, None], half[:, None, :]].sum((2, 3)) for half in orders.chunk(2, 1)
        )
        halves[part] = ids.gather(1, orders[torch.as_tensor(gains).argmax(1)])
    return halves.view(2 * count, size // 2)


def _divisions(size: int) -> Tensor:
    """Orders `[n, size]` in which each division of `size` positions in two halves occurs once."""
    everything = range(size)
    lefts = [(0, *rest) for rest in combinations(everything[1:], size // 2 - 1)]
    return torch.tensor([[*left, *(p for p in everything if p not in left)] for left in lefts])
