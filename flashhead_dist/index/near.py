"""Pairs of near clusters, found without comparing all centroids with all.

Clusters are in tree order, so blocks of consecutive ones are coarse cells: a cluster is compared
with those of the blocks nearest to its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

NEIGHBOURS = 8
_BLOCK = 64
_BLOCKS_SEARCHED = 32


def near_pairs(clustered: Tensor) -> Tensor:
    """Pairs int64 `[E, 2]`, first below second, ascending, of clusters with near means.

    clustered: `[C, S, D]`. Each cluster is in a pair with its NEIGHBOURS nearest found.
    """
    centroids = clustered.mean(1)
    num_clusters = len(centroids)
    half_norms = centroids.square().sum(1) / 2
    searched = _near_blocks(centroids)
    within = torch.arange(_BLOCK, device=centroids.device)
    found = []
    for block, others in enumerate(searched):
        own = torch.arange(
            block * _BLOCK, min((block + 1) * _BLOCK, num_clusters), device=centroids.device
        )
        ids = (others.unsqueeze(1) * _BLOCK + within).flatten()
        ids = ids[ids < num_clusters]
        closeness = centroids[own] @ torch.index_select(centroids, 0, ids).T - half_norms[ids]
        closeness.masked_fill_(ids == own.unsqueeze(1), float("-inf"))
        best = closeness.topk(min(NEIGHBOURS, len(ids) - 1), dim=1).indices
        near = ids[best]
        mine = own.unsqueeze(1).expand_as(near)
        found.append(
            (torch.minimum(mine, near) * num_clusters + torch.maximum(mine, near)).flatten()
        )
    codes = torch.unique(torch.cat(found))
    return torch.stack([codes // num_clusters, codes % num_clusters], dim=1)


def _near_blocks(centroids: Tensor) -> Tensor:
    """Blocks `[blocks, searched]` whose means are nearest to each block's, itself included."""
    means = torch.stack([block.mean(0) for block in torch.split(centroids, _BLOCK)])
    closeness = means @ means.T - means.square().sum(1) / 2
    closeness.fill_diagonal_(float("inf"))
    return closeness.topk(min(_BLOCKS_SEARCHED, len(means)), dim=1).indices
