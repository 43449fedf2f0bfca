"""Refinement: near clusters pool their rows and divide them again, as long as that helps.

Clusters keep their size. A pair pools its 2S slots and takes the best division: every one is tried
for S up to 4, above that the best exchange of two rows. The gain is the fall of the summed squared
distance of rows to their cluster's mean, so a round can only help, and rounds go on until one
hardly does. A round evaluates pairs of near clusters, as far as they changed, and carries out the
best of them in which no cluster occurs twice. Unlike an assignment of rows to fixed centroids, no
step makes things worse, and one step reads 2S rows instead of all centroids.

C clusters of S slots; K near clusters of each; E pairs; vectors have D coordinates. A pad counts as
a row at the mean of all rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flashhead_dist.index.divide import Divisions
from flashhead_dist.index.near import near_pairs

MAX_ROUNDS = 60
ROUNDS_PER_GRAPH = 5
STOP_SHARE = 0.001
"""Rounds end when a fresh set of pairs lowers the distance by less than this share."""
_MATCHING_PASSES = 12
_RELATIVE_NOISE = 1e-5


def refine(
    vectors: Tensor,
    slots: Tensor,
    *,
    max_rounds: int = MAX_ROUNDS,
    on_round: Callable[[int, float], None] = lambda rounds, share: None,
) -> tuple[Tensor, int]:
    """Return refined slots `[C, S]` and the number of rounds.

    vectors: float32 `[V, D]` of mean 0; slots: int64 in tree order, -1 for pads.
    on_round(rounds, share): called after each round with the share it took off the distance.
    """
    num_clusters, size = slots.shape
    if size < 2 or num_clusters < 2:
        return slots, 0
    slots = slots.clone()
    everything = torch.arange(num_clusters, device=slots.device)
    clustered = torch.empty(
        num_clusters, size, vectors.shape[1], dtype=torch.float32, device=vectors.device
    )
    _gather(vectors, slots, everything, clustered)
    divisions = Divisions(clustered)
    distance = _distance(clustered)
    rounds = 0
    while rounds < max_rounds:
        pairs = near_pairs(clustered)
        gains = torch.full((len(pairs),), -1.0, dtype=torch.float32, device=slots.device)
        stale = torch.arange(len(pairs), device=slots.device)
        before = distance
        for _ in range(min(ROUNDS_PER_GRAPH, max_rounds - rounds)):
            gains[stale] = divisions.gains(pairs[stale])
            threshold = _RELATIVE_NOISE * distance / num_clusters
            taken = _disjoint(pairs, gains, threshold, num_clusters)
            if not len(taken):
                break
            chosen = pairs[taken]
            slots[chosen] = divisions.divide(chosen, slots[chosen].flatten(1))
            changed = chosen.flatten()
            _gather(vectors, slots, changed, clustered)
            divisions.update(changed)
            gained = float(gains[taken].sum(dtype=torch.float64))
            on_round(rounds + 1, gained / max(distance, 1e-30))
            distance -= gained
            rounds += 1
            is_changed = torch.zeros(num_clusters, dtype=torch.bool, device=slots.device)
            is_changed[changed] = True
            stale = torch.nonzero(is_changed[pairs].any(1)).flatten()
        if before - distance <= STOP_SHARE * before:
            break
    return slots, rounds


def _gather(vectors: Tensor, slots: Tensor, clusters: Tensor, clustered: Tensor) -> None:
    """Copy the rows of `clusters` to their place in `clustered [C, S, D]`, zeros for pads."""
    for part in torch.split(clusters, 8192):
        ids = slots[part]
        rows = torch.index_select(vectors, 0, ids.clamp(min=0).flatten())
        rows = rows.masked_fill_((ids < 0).flatten().unsqueeze(1), 0)
        clustered[part] = rows.reshape(*ids.shape, -1)


def _distance(clustered: Tensor) -> float:
    """Summed squared distance of rows to their cluster's mean."""
    total = 0.0
    for part in torch.split(clustered, 8192):
        total += float((part - part.mean(1, keepdim=True)).square().sum(dtype=torch.float64))
    return total


def _disjoint(pairs: Tensor, gains: Tensor, threshold: float, num_clusters: int) -> Tensor:
    """Indices of pairs that gain more than `threshold`, greatest gains first, each cluster once.

    Of equal gains the earlier pair wins. Passes are bounded: what is left waits for the next round.
    """
    useful = torch.nonzero(gains > threshold).flatten()
    waiting = useful[torch.argsort(gains[useful], descending=True, stable=True)]
    taken = [waiting[:0]]
    for _ in range(_MATCHING_PASSES):
        if not len(waiting):
            break
        both = pairs[waiting]
        rank = torch.arange(len(waiting), device=pairs.device)
        first = torch.full((num_clusters,), len(waiting), device=pairs.device)
        for side in (0, 1):
            first.scatter_reduce_(0, both[:, side], rank, "amin")
        wins = (first[both] == rank.unsqueeze(1)).all(1)
        taken.append(waiting[wins])
        busy = torch.zeros(num_clusters, dtype=torch.bool, device=pairs.device)
        busy[both[wins].flatten()] = True
        waiting = waiting[~busy[both].any(1)]
    return torch.cat(taken)
