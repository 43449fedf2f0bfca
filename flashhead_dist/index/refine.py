"""Refinement: neighbouring clusters pool their rows and divide them anew while that helps.

Clusters keep their size. A pair pools its 2S slots and takes the best split into two clusters:
every split is tried for S up to 4, above that every exchange of one row for one. The gain is the
fall of the summed squared distance of rows to their cluster's mean, so a round can only help, and
rounds go on until one hardly does. A round evaluates the pairs of neighbours, as far as they
changed, and carries out the best of them in which no cluster occurs twice. Unlike an assignment of
rows to fixed centroids, no step makes things worse, and one step reads 2S rows instead of all
centroids.

C clusters of S slots in tree order; E pairs; vectors have D coordinates. A pad counts as a row at
the mean of all rows.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations, product

import torch
from torch import Tensor

MAX_ROUNDS = 60
ROUNDS_PER_GRAPH = 5
NEIGHBOURS = 8
STOP_SHARE = 0.001
"""Rounds end when a fresh set of pairs lowers the distance by less than this share."""
_MATCHING_PASSES = 12
_RELATIVE_NOISE = 1e-5
_BLOCK = 64
_BLOCKS_SEARCHED = 32
_EVERY_SPLIT_UP_TO = 4
_CHUNK_FLOATS = 1 << 21
_CHUNK_CLUSTERS = 8192


def refine(
    vectors: Tensor,
    slots: Tensor,
    *,
    max_rounds: int = MAX_ROUNDS,
    on_round: Callable[[float], None] = lambda share: None,
) -> tuple[Tensor, int]:
    """Return refined slots `[C, S]` and the number of rounds.

    vectors: float32 `[V, D]` of mean 0; slots: int64 in tree order, -1 for pads.
    on_round(share): called after each round with the share of the distance that it removed.
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
    splitter = PairSplitter(clustered)
    distance = _distance(clustered)
    rounds = 0
    while rounds < max_rounds:
        pairs = neighbour_pairs(clustered)
        gains = torch.full((len(pairs),), -1.0, dtype=torch.float32, device=slots.device)
        stale = torch.arange(len(pairs), device=slots.device)
        before = distance
        for _ in range(min(ROUNDS_PER_GRAPH, max_rounds - rounds)):
            gains[stale] = splitter.gains(pairs[stale])
            threshold = _RELATIVE_NOISE * distance / num_clusters
            taken = _disjoint(pairs, gains, threshold, num_clusters)
            if not len(taken):
                break
            chosen = pairs[taken]
            slots[chosen] = splitter.split(chosen, slots[chosen].flatten(1))
            changed = chosen.flatten()
            _gather(vectors, slots, changed, clustered)
            splitter.update(changed)
            gained = float(gains[taken].sum(dtype=torch.float64))
            on_round(gained / max(distance, 1e-30))
            distance -= gained
            rounds += 1
            is_changed = torch.zeros(num_clusters, dtype=torch.bool, device=slots.device)
            is_changed[changed] = True
            stale = torch.nonzero(is_changed[pairs].any(1)).flatten()
        if before - distance <= STOP_SHARE * before:
            break
    return slots, rounds


def neighbour_pairs(clustered: Tensor) -> Tensor:
    """Pairs int64 `[E, 2]`, first below second, ascending, of clusters with similar means.

    clustered: `[C, S, D]`. Each cluster is in a pair with its NEIGHBOURS nearest found: blocks of
    consecutive clusters are coarse cells, and a cluster is compared with those of the blocks
    nearest to its own.
    """
    centroids = clustered.mean(1)
    num_clusters = len(centroids)
    half_norms = centroids.square().sum(1) / 2
    means = torch.stack([block.mean(0) for block in torch.split(centroids, _BLOCK)])
    closeness = means @ means.T - means.square().sum(1) / 2
    closeness.fill_diagonal_(float("inf"))
    searched = closeness.topk(min(_BLOCKS_SEARCHED, len(means)), dim=1).indices
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
        nearest = ids[closeness.topk(min(NEIGHBOURS, len(ids) - 1), dim=1).indices]
        mine = own.unsqueeze(1).expand_as(nearest)
        codes = torch.minimum(mine, nearest) * num_clusters + torch.maximum(mine, nearest)
        found.append(codes.flatten())
    unique = torch.unique(torch.cat(found))
    return torch.stack([unique // num_clusters, unique % num_clusters], dim=1)


class PairSplitter:
    """The best split of two clusters' rows into two clusters of the same size, for many pairs.

    With rows x of mean 0, the summed squared distance to the means of two clusters A, B of S rows
    is a constant less (|sum of A|^2 + |sum of B|^2) / S, which is linear in the Gram matrix of the
    2S rows. So the gains of all splits of many pairs are one product of Gram matrices with a fixed
    table. Where there are too many splits (S > 4) only exchanges of one row for one are considered,
    whose gains follow from a few sums over the same matrices.
    """

    def __init__(self, clustered: Tensor) -> None:
        """clustered: `[C, S, D]`, which the caller changes in place and reports to `update`."""
        self._rows = clustered
        num_clusters, size, _ = clustered.shape
        device = clustered.device
        self._orders = splits(size).to(device)
        self._tables: tuple[Tensor, ...] = ()
        if size <= _EVERY_SPLIT_UP_TO:
            self._tables = tuple(table.to(device) for table in _tables(self._orders.cpu(), size))
        self._grams = torch.empty(num_clusters, size * size, dtype=torch.float32, device=device)
        self.update(torch.arange(num_clusters, device=device))

    def update(self, clusters: Tensor) -> None:
        """These clusters' rows have changed."""
        for part in torch.split(clusters, self._chunk):
            rows = self._take(part)
            self._grams[part] = torch.bmm(rows, rows.transpose(1, 2)).flatten(1)

    def gains(self, pairs: Tensor) -> Tensor:
        """Gain float32 `[E]` of the best split of each of `pairs [E, 2]`; at least 0."""
        parts = [self._evaluate(part).amax(1) for part in torch.split(pairs, self._chunk)]
        return torch.cat(parts) if parts else pairs.new_empty(0, dtype=torch.float32)

    def split(self, pairs: Tensor, slots: Tensor) -> Tensor:
        """`slots [E, 2S]` of `pairs` in the order of their best split, as `[E, 2, S]`."""
        parts = zip(torch.split(pairs, self._chunk), torch.split(slots, self._chunk), strict=True)
        found = [
            pooled.gather(1, self._orders[self._evaluate(part).argmax(1)]) for part, pooled in parts
        ]
        return torch.cat(found).reshape(len(pairs), 2, -1)

    @property
    def _chunk(self) -> int:
        _, size, width = self._rows.shape
        return max(1, _CHUNK_FLOATS // max(2 * size * width, len(self._orders)))

    def _take(self, clusters: Tensor) -> Tensor:
        _, size, width = self._rows.shape
        # One contiguous copy per cluster: several times faster than indexing rows.
        return torch.index_select(self._rows.flatten(1), 0, clusters).reshape(-1, size, width)

    def _evaluate(self, pairs: Tensor) -> Tensor:
        """Gains `[E, splits]`; the first split changes nothing and gains 0."""
        first, second = pairs[:, 0], pairs[:, 1]
        cross = torch.bmm(self._take(first), self._take(second).transpose(1, 2))
        if not self._tables:
            grams = self._grams[pairs.T].reshape(2, *cross.shape)
            return _exchange_gains(grams[0], grams[1], cross)
        of_first, of_second, between = self._tables
        gains = cross.flatten(1) @ between
        gains += self._grams[first] @ of_first
        gains += self._grams[second] @ of_second
        return gains


def splits(size: int) -> Tensor:
    """Orders `[splits, 2S]` of pooled positions; the first S are the first cluster's.

    Every split for S up to 4, else the exchanges of one for one. The first changes nothing. A split
    and its mirror image are one, so position 0 stays in the first cluster.
    """
    everything = range(2 * size)
    if size <= _EVERY_SPLIT_UP_TO:
        lefts = [(0, *rest) for rest in combinations(everything[1:], size - 1)]
        orders = [[*left, *(p for p in everything if p not in left)] for left in lefts]
        return torch.tensor(orders)
    orders = [list(everything)]
    for mine, theirs in product(range(size), range(size, 2 * size)):
        swapped = list(everything)
        swapped[mine], swapped[theirs] = theirs, mine
        orders.append(swapped)
    return torch.tensor(orders)


def _exchange_gains(first: Tensor, second: Tensor, cross: Tensor) -> Tensor:
    """Gains `[E, 1 + S * S]` of the exchanges of `splits`, from Gram matrices `[E, S, S]`.

    Exchanging a for b gains (2 / S) * (|a - b|^2 + (sum of A - sum of B) . (b - a)).
    """
    squares = first.diagonal(dim1=1, dim2=2).unsqueeze(2) + second.diagonal(
        dim1=1, dim2=2
    ).unsqueeze(1)
    lean_of_first = first.sum(2) - cross.sum(2)
    lean_of_second = cross.sum(1) - second.sum(2)
    gains = squares - 2 * cross + lean_of_second.unsqueeze(1) - lean_of_first.unsqueeze(2)
    return torch.nn.functional.pad(gains.flatten(1) * (2 / first.shape[1]), (1, 0))


def _tables(orders: Tensor, size: int) -> list[Tensor]:
    """What each Gram entry adds to the gain of each split: three `[S * S, splits]`.

    For the Gram matrix of the first cluster, of the second, and between them (counted twice).
    """
    in_first = torch.zeros(orders.shape, dtype=torch.float32)
    in_first.scatter_(1, orders[:, :size], 1.0)
    together = in_first[:, :, None] * in_first[:, None, :]
    together += (1 - in_first[:, :, None]) * (1 - in_first[:, None, :])
    table = (together - together[0]) / size
    of_first, of_second = table[:, :size, :size], table[:, size:, size:]
    between = 2 * table[:, :size, size:]
    return [part.flatten(1).T.contiguous() for part in (of_first, of_second, between)]


def _gather(vectors: Tensor, slots: Tensor, clusters: Tensor, clustered: Tensor) -> None:
    """Copy the rows of `clusters` to their place in `clustered [C, S, D]`, zeros for pads."""
    for part in torch.split(clusters, _CHUNK_CLUSTERS):
        ids = slots[part]
        rows = torch.index_select(vectors, 0, ids.clamp(min=0).flatten())
        rows = rows.masked_fill_((ids < 0).flatten().unsqueeze(1), 0)
        clustered[part] = rows.reshape(*ids.shape, -1)


def _distance(clustered: Tensor) -> float:
    """Summed squared distance of rows to their cluster's mean."""
    total = 0.0
    for part in torch.split(clustered, _CHUNK_CLUSTERS):
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
