"""An ablation: clusters of any size, from plain k-means, in place of equal ones.

Lloyd's iterations run within nodes of the tree that hold the same rows as some equal clusters, so
there are as many centroids to read, and nothing but the sizes of clusters is set free. A probe then
reads as many rows as its cluster has; what is compared is top-1 at equal mean rows read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flashhead_dist.index.compensate import quantize_for_states
from flashhead_dist.index.metric import moment_root, score_deviations
from flashhead_dist.tune.scene import Scene
from flashhead_kernels.quantize import quantize_centroids, quantize_hidden_states

_NODE_ROWS = 1024
_ITERATIONS = 10
_ROWS_STATES = 512
_CHUNK_ROWS = 1 << 15


def lloyd(scene: Scene) -> Tensor:
    """Cluster int64 `[V]` of every token, 0..C-1 in tree order, -1 for one in no cluster.

    An empty cluster stays where it was, and empty.
    """
    count, size = scene.slots.shape
    step = max(1, _NODE_ROWS // size)
    owner = torch.full((len(scene.weights),), -1, dtype=torch.int64)
    generator = torch.Generator().manual_seed(0)
    for start in range(0, count, step):
        slots = scene.slots[start : start + step]
        real = slots >= 0
        ids = slots[real]
        rows = scene.vectors[ids]
        # Equal clusters are where Lloyd's iterations hardly move: start from rows at random.
        first = torch.randperm(len(rows), generator=generator)[: len(slots)]
        centres = torch.zeros(len(slots), rows.shape[1])
        centres[: len(first)] = rows[first]
        for _ in range(_ITERATIONS):
            own = (rows @ centres.T - centres.square().sum(1) / 2).argmax(1)
            sums = torch.zeros_like(centres).index_add_(0, own, rows)
            sizes = torch.bincount(own, minlength=len(slots)).unsqueeze(1)
            centres = torch.where(sizes > 0, sums / sizes.clamp(min=1), centres)
        owner[ids] = start + own
    return owner


def measure_unequal(
    scene: Scene, owner: Tensor, probes: Sequence[int], alpha: float, group_size: int = 64
) -> list[dict[str, Any]]:
    """For each number of probes a group: mean rows read, and top-1 on the selection states.

    owner: from `lloyd`. Centroids are int4 with all columns, compensated as an index's.
    """
    count, groups = len(scene.slots), scene.num_groups
    centroids, spread, sizes = _describe(scene, owner, count)
    stored = (
        quantize_centroids(centroids, 4, group_size)
        if scene.moment is None
        else quantize_for_states(centroids, scene.moment, 4, group_size)
    ).dequantize()
    integers, scales = quantize_hidden_states(scene.states, group_size)
    states = integers * scales.repeat_interleave(group_size, dim=1)
    norms = torch.linalg.vector_norm(scene.states.float(), dim=1, keepdim=True)
    home = owner[scene.top_tokens[:, 0]]
    ranks = torch.full((len(states),), -1, dtype=torch.int64)
    few = torch.arange(0, len(states), max(1, len(states) // _ROWS_STATES))
    rows_read = torch.zeros(len(probes), dtype=torch.float64)
    for group in range(groups):
        clusters = torch.arange(group, count, groups)
        bias = torch.where(sizes[clusters] > 0, alpha * spread[clusters], float("-inf"))

        def score(rows: Tensor, clusters: Tensor = clusters, bias: Tensor = bias) -> Tensor:
            scored: Tensor = states[rows] @ stored[clusters].T + norms[rows] * bias
            return scored

        members = torch.nonzero((home % groups == group) & (home >= 0)).flatten()
        if len(members):
            scores = score(members)
            mine = scores.gather(1, (home[members] // groups).unsqueeze(1))
            ranks[members] = (scores > mine).sum(1)
        ordered = score(few).argsort(1, descending=True)
        read = sizes[clusters][ordered].double().cumsum(1).mean(0)
        rows_read += torch.stack([read[p - 1] for p in probes])
    found = []
    for place, p in enumerate(probes):
        shares = scene.selection.shares(ranks < p)
        found.append(
            {
                "probes_per_group": p,
                "mean_rows": float(rows_read[place]),
                "top1": shares.overall,
                "top1_worst": shares.worst,
                "worst_source": shares.worst_source,
                "largest_cluster": int(sizes.max()),
                "empty_clusters": int((sizes == 0).sum()),
            }
        )
    return found


def _describe(scene: Scene, owner: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Means `[C, D]`, spread `[C]` as `index.layout.describe_clusters`, and sizes `[C]`."""
    tokens = torch.nonzero(owner >= 0).flatten()
    sizes = torch.bincount(owner[tokens], minlength=count)
    means = torch.zeros(count, scene.weights.shape[1])
    for part in torch.split(tokens, _CHUNK_ROWS):
        means.index_add_(0, owner[part], scene.weights[part].float())
    means /= sizes.clamp(min=1).unsqueeze(1)
    root = moment_root(scene.moment, scene.weights.shape[1])
    spread = torch.zeros(count)
    for part in torch.split(tokens, _CHUNK_ROWS):
        strays = score_deviations(scene.weights[part].float() - means[owner[part]], root)
        spread.scatter_reduce_(0, owner[part], strays, "amax")
    return means, spread, sizes


def owner_of(scene: Scene) -> Tensor:
    """Cluster int64 `[V]` of every token in the scene's own equal clusters."""
    owner = torch.full((len(scene.weights),), -1, dtype=torch.int64)
    real = scene.slots >= 0
    owner[scene.slots[real]] = (
        torch.arange(len(scene.slots)).unsqueeze(1).expand_as(scene.slots)[real]
    )
    return owner
