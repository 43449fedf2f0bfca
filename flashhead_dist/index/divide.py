"""The best division of two clusters' rows into two clusters of the same size.

With rows x of mean 0, the summed squared distance to the means of two clusters A, B of S rows is a
constant less (|sum of A|^2 + |sum of B|^2) / S, which is linear in the Gram matrix of the 2S rows.
So the gains of all divisions of many pairs are one product of Gram matrices with a fixed table.
Where there are too many divisions (S > 4) only exchanges of one row for one are considered, whose
gains follow from a few sums over the same matrices.
"""

from __future__ import annotations

from itertools import combinations, product

import torch
from torch import Tensor

_EVERY_DIVISION_UP_TO = 4
_CHUNK_FLOATS = 1 << 21


class Divisions:
    """Divisions of pairs of `clustered [C, S, D]`, which the caller changes in place.

    Exchanging positions is all a division does: a permutation of the 2S pooled positions.
    """

    def __init__(self, clustered: Tensor) -> None:
        self._rows = clustered
        num_clusters, size, _ = clustered.shape
        device = clustered.device
        self._orders = _orders(size).to(device)
        self._tables: tuple[Tensor, ...] = ()
        if size <= _EVERY_DIVISION_UP_TO:
            self._tables = tuple(table.to(device) for table in _tables(self._orders.cpu(), size))
        self._grams = torch.empty(num_clusters, size * size, dtype=torch.float32, device=device)
        self.update(torch.arange(num_clusters, device=device))

    def update(self, clusters: Tensor) -> None:
        """Take note that these clusters' rows have changed."""
        for part in torch.split(clusters, self._chunk):
            rows = self._take(part)
            self._grams[part] = torch.bmm(rows, rows.transpose(1, 2)).flatten(1)

    def gains(self, pairs: Tensor) -> Tensor:
        """Gain float32 `[E]` of the best division of each of `pairs [E, 2]`; at least 0."""
        parts = [self._evaluate(part).amax(1) for part in torch.split(pairs, self._chunk)]
        return torch.cat(parts) if parts else pairs.new_empty(0, dtype=torch.float32)

    def divide(self, pairs: Tensor, slots: Tensor) -> Tensor:
        """`slots [E, 2S]` of `pairs` in the order of their best division, as `[E, 2, S]`."""
        parts = [
            slots[start : start + self._chunk].gather(
                1, self._orders[self._evaluate(pairs[start : start + self._chunk]).argmax(1)]
            )
            for start in range(0, len(pairs), self._chunk)
        ]
        return torch.cat(parts).reshape(len(pairs), 2, -1)

    @property
    def _chunk(self) -> int:
        _, size, width = self._rows.shape
        return max(1, _CHUNK_FLOATS // max(2 * size * width, len(self._orders)))

    def _take(self, clusters: Tensor) -> Tensor:
        _, size, width = self._rows.shape
        # One contiguous piece a cluster: several times faster than indexing rows.
        return torch.index_select(self._rows.flatten(1), 0, clusters).reshape(-1, size, width)

    def _evaluate(self, pairs: Tensor) -> Tensor:
        """Gains `[E, divisions]`; the first division changes nothing and gains 0."""
        first, second = pairs[:, 0], pairs[:, 1]
        cross = torch.bmm(self._take(first), self._take(second).transpose(1, 2))
        if not self._tables:
            return _exchange_gains(
                self._grams[first].reshape(cross.shape),
                self._grams[second].reshape(cross.shape),
                cross,
            )
        of_first, of_second, between = self._tables
        gains = cross.flatten(1) @ between
        gains += self._grams[first] @ of_first
        gains += self._grams[second] @ of_second
        return gains


def _orders(size: int) -> Tensor:
    """Orders `[divisions, 2S]` of pooled positions; the first S are the first cluster's.

    A division and its mirror image are one, so position 0 stays in the first cluster.
    """
    everything = range(2 * size)
    if size <= _EVERY_DIVISION_UP_TO:
        lefts = [(0, *rest) for rest in combinations(everything[1:], size - 1)]
        orders = [[*left, *(p for p in everything if p not in left)] for left in lefts]
        return torch.tensor(orders)
    identity = list(everything)
    orders = [identity]
    for mine, theirs in product(range(size), range(size, 2 * size)):
        swapped = identity.copy()
        swapped[mine], swapped[theirs] = theirs, mine
        orders.append(swapped)
    return torch.tensor(orders)


def _exchange_gains(first: Tensor, second: Tensor, cross: Tensor) -> Tensor:
    """Gains `[E, 1 + S * S]` of the exchanges of `_orders`, from Gram matrices `[E, S, S]`.

    Exchanging a for b gains (2 / S) * (|a - b|^2 + (sum of A - sum of B) . (b - a)).
    """
    squares = first.diagonal(dim1=1, dim2=2).unsqueeze(2) + second.diagonal(
        dim1=1, dim2=2
    ).unsqueeze(1)
    lean_of_first = first.sum(2) - cross.sum(2)
    lean_of_second = cross.sum(1) - second.sum(2)
    gains = squares - 2 * cross + lean_of_second.unsqueeze(1) - lean_of_first.unsqueeze(2)
    return torch.nn.functional.pad(gains.flatten(1) * (2 / first.shape[1]), (1, 0))


def _tables(orders: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """What each Gram entry adds to the gain of each division: three `[S * S, divisions]`.

    For the Gram matrix of the first cluster, of the second, and between them (counted twice).
    """
    in_first = torch.zeros(orders.shape, dtype=torch.float32)
    in_first.scatter_(1, orders[:, :size], 1.0)
    together = in_first[:, :, None] * in_first[:, None, :]
    together += (1 - in_first[:, :, None]) * (1 - in_first[:, None, :])
    table = (together - together[0]) / size
    pieces = (
        table[:, :size, :size],
        table[:, size:, size:],
        2 * table[:, :size, size:],
    )
    first, second, cross = (piece.flatten(1).T.contiguous() for piece in pieces)
    return first, second, cross
