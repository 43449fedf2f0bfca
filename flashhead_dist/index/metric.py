"""Which rows count as close: those that the hidden states hardly tell apart.

Rows w and w' get the same logit from h where h . (w - w') is small, so distances are measured in
(w - w')^T A (w - w') with A = (mean of h h^T over unit-normed calibration states)^exponent.
Exponent 1 is the mean squared difference of logits, which a few strong directions dominate; 0 is
Euclidean; between them clusters stay useful for texts that the calibration did not see. Clusters
are then found in the leading principal axes alone, which is cheaper and no worse.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

CLUSTER_DIMENSIONS = 256
_CHUNK_ROWS = 1 << 15
_RELATIVE_FLOOR = 1e-7


def second_moment(states: Tensor) -> Tensor:
    """Mean float64 `[D, D]` of h h^T over unit-normed `states [N, D]`."""
    total = torch.zeros(states.shape[1], states.shape[1], dtype=torch.float64, device=states.device)
    for part in torch.split(states, _CHUNK_ROWS):
        unit = torch.nn.functional.normalize(part.double(), dim=1)
        total += unit.T @ unit
    return total / max(1, len(states))


def cluster_space(rows: Tensor, moment: Tensor | None, exponent: float) -> Tensor:
    """Coordinates float32 `[V, min(D, 256)]` of `rows [V, D]`, of mean 0, in which clusters form.

    moment: `[D, D]` from `second_moment`; None or an exponent of 0 keeps the Euclidean metric.
    """
    hidden_size = rows.shape[1]
    transform = torch.eye(hidden_size, dtype=torch.float64, device=rows.device)
    if moment is not None and exponent > 0:
        transform = _metric(moment.to(rows.device), exponent)
    mean, covariance = _statistics(rows)
    _, axes = torch.linalg.eigh(transform.T @ covariance @ transform)
    # Leading axes first. Their sign is arbitrary, as is that of the transform's columns, so it is
    # fixed by the largest entry of what they make together.
    axes = transform @ axes.flip(1)[:, :CLUSTER_DIMENSIONS]
    largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
    projection = (axes * largest.sign()).float()
    offset = mean.float() @ projection
    result = torch.empty(len(rows), projection.shape[1], dtype=torch.float32, device=rows.device)
    for start in range(0, len(rows), _CHUNK_ROWS):
        part = slice(start, start + _CHUNK_ROWS)
        result[part] = rows[part].float() @ projection - offset
    return result


def score_deviations(residuals: Tensor, root: Tensor) -> Tensor:
    """Rms, over unit-normed states h, of h . r for residuals r `[..., D]`.

    root: of the states' second moment, from `moment_root`.
    """
    deviations: Tensor = torch.linalg.vector_norm(residuals @ root, dim=-1)
    return deviations


def moment_root(moment: Tensor | None, hidden_size: int) -> Tensor:
    """Matrix float32 `[D, D]` R with R R^T = moment; states in every direction alike where None."""
    if moment is None:
        return torch.eye(hidden_size, dtype=torch.float32) / math.sqrt(hidden_size)
    values, vectors = torch.linalg.eigh(moment)
    root: Tensor = (vectors * values.clamp(min=0).sqrt()).float()
    return root


def _metric(moment: Tensor, exponent: float) -> Tensor:
    """Matrix `[D, D]` after which Euclidean distance is the metric; A's mean eigenvalue is 1."""
    values, vectors = torch.linalg.eigh(moment)
    values = values.clamp(min=float(values[-1]) * _RELATIVE_FLOOR) ** exponent
    scaled: Tensor = vectors * (values / values.mean()).sqrt()
    return scaled


def _statistics(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean `[D]` and covariance `[D, D]` of rows, float64."""
    hidden_size = rows.shape[1]
    total = torch.zeros(hidden_size, dtype=torch.float64, device=rows.device)
    products = torch.zeros(hidden_size, hidden_size, dtype=torch.float64, device=rows.device)
    for part in torch.split(rows, _CHUNK_ROWS):
        values = part.float()
        total += values.sum(0, dtype=torch.float64)
        products += values.T @ values
    mean = total / len(rows)
    return mean, products / len(rows) - torch.outer(mean, mean)
