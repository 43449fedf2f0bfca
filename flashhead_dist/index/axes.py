"""Leading axes: the few coordinates in which hidden states tell clusters apart.

The score of a centroid c for a hidden state h is h . c. Over states of second moment A and
centroids of covariance K, the m-term bilinear form x(h) . y(c) that comes closest to it in the mean
square (up to h . mean, which is the same for every cluster) takes the m leading eigenvectors of
A^(1/2) K A^(1/2): the optimal rank-m approximation of Eckart and Young
(https://doi.org/10.1007/BF02288367) in the metric of the states. A scan of centroids then reads m
columns each instead of D.

Coordinates are scaled so that centroids vary alike along each of them, and rotated at random, so
that one scale serves a group of columns well; `compensate.quantize_for_states` with the states'
second moment in these coordinates then moves rounding errors to where states have little energy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_RELATIVE_FLOOR = 1e-7


@dataclass(frozen=True)
class LeadingAxes:
    """Coordinates of centroids and of hidden states, float32 `[D, m]` each.

    `(h @ to_state) . (c @ to_centroid)` approximates h . c for centroids c less their mean.
    """

    to_centroid: Tensor
    to_state: Tensor

    def moment(self, second_moment: Tensor) -> Tensor:
        """Second moment `[m, m]` of states in these coordinates, from theirs `[D, D]`."""
        projection = self.to_state.to(second_moment)
        return projection.T @ second_moment @ projection


def leading_axes(
    covariance: Tensor, second_moment: Tensor | None, num_axes: int, *, seed: int = 0
) -> LeadingAxes:
    """The best `num_axes` coordinates for scoring centroids.

    covariance: of the centroids, `[D, D]`. second_moment: `metric.second_moment` of calibration
    states, `[D, D]`; None counts states in every direction alike. Double precision inside.

    Raises:
        ValueError: `num_axes` outside 1..D.
    """
    hidden_size = len(covariance)
    if not 1 <= num_axes <= hidden_size:
        raise ValueError(f"{num_axes} axes must lie between 1 and the hidden size {hidden_size}")
    covariance = covariance.double().cpu()
    moment = torch.eye(hidden_size, dtype=torch.float64)
    if second_moment is not None:
        moment = second_moment.double().cpu()
    energies, directions = torch.linalg.eigh(moment)
    energies = _above_floor(energies)
    root = (directions * energies.sqrt()) @ directions.T
    inverse_root = (directions / energies.sqrt()) @ directions.T
    variances, axes = torch.linalg.eigh(root @ covariance @ root)
    axes = axes.flip(1)[:, :num_axes]
    deviations = _above_floor(variances).flip(0)[:num_axes].sqrt()
    # The sign of an eigenvector is arbitrary: fixed by the largest entry of what it makes.
    to_state = inverse_root @ axes
    sign = to_state.gather(0, to_state.abs().argmax(0, keepdim=True)).sign()
    rotation = _rotation(num_axes, seed)
    return LeadingAxes(
        to_centroid=((root @ axes) * sign / deviations @ rotation).float(),
        to_state=(to_state * sign * deviations @ rotation).float(),
    )


def centroid_covariance(centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Mean float32 `[D]` and covariance float64 `[D, D]` of `centroids [..., D]`."""
    flat = centroids.flatten(0, -2).float()
    mean = flat.mean(0, dtype=torch.float64)
    total = torch.zeros(flat.shape[1], flat.shape[1], dtype=torch.float64, device=flat.device)
    for part in torch.split(flat, 1 << 15):
        centred = part - mean.float()
        total += centred.T @ centred
    return mean.float(), total / max(1, len(flat))


def _above_floor(values: Tensor) -> Tensor:
    """`values`, ascending, none below a small part of the greatest; ones where all are zero."""
    greatest = float(values[-1])
    return values.clamp(min=greatest * _RELATIVE_FLOOR) if greatest > 0 else torch.ones_like(values)


def _rotation(size: int, seed: int) -> Tensor:
    """A random orthogonal matrix, float64 `[size, size]`."""
    generator = torch.Generator().manual_seed(seed)
    rotation: Tensor = torch.linalg.qr(
        torch.randn(size, size, generator=generator, dtype=torch.float64)
    )[0]
    return rotation
