"""Scoring centroids by fewer columns: hidden states in the coordinates that centroids are kept in.

    h . centroid  ~  (to_state h) . stored + h . mean

with m < D coordinates for each stored centroid, from which the mean of all centroids was taken off.
Which coordinates to keep is the index's business (`flashhead_dist.index.axes`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Projection:
    """to_state: float32 `[m, D]`; mean: float32 `[D]`, of all centroids."""

    to_state: Tensor
    mean: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes that projecting a batch reads once."""
        return self.to_state.nbytes + self.mean.nbytes

    def to(self, device: torch.device | str) -> Projection:
        return Projection(self.to_state.to(device), self.mean.to(device))


def project_states(hidden_states: Tensor, projection: Projection) -> tuple[Tensor, Tensor]:
    """Coordinates float32 `[B, m]` of `hidden_states [B, D]`, and `h . mean` float32 `[B]`.

    One row at a time: a matrix product may add in an order that depends on the number of rows.
    """
    table = torch.cat([projection.to_state, projection.mean.unsqueeze(0)])
    products = [(table * hidden).sum(1) for hidden in hidden_states.float()]
    if not products:
        empty = hidden_states.new_empty((0, len(table)), dtype=torch.float32)
        return empty[:, :-1], empty[:, -1]
    both = torch.stack(products)
    return both[:, :-1], both[:, -1]
