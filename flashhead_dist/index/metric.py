"""Which rows count as close: those that the hidden states cannot tell apart.

Rows w and w' get the same logit from h where h . (w - w') is small, so distances are measured in
(w - w')^T A (w - w') with A = (mean of h h^T over unit-normed calibration states)^exponent.
Exponent 1 is the mean squared difference of logits, which a few strong directions dominate; 0 is
Euclidean; between them clusters stay useful for texts that the calibration did not see.
"""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK_ROWS = 1 << 16
_RELATIVE_FLOOR = 1e-7


def hidden_metric(states: Tensor, exponent: float) -> Tensor:
    """Matrix T float32 `[D, D]` such that Euclidean distance after `rows @ T` is the metric.

    states: `[N, D]`. Scaled so that the mean of A's eigenvalues is 1.
    """
    unit = torch.nn.functional.normalize(states.double(), dim=1)
    values, vectors = torch.linalg.eigh(unit.T @ unit / max(1, len(unit)))
    values = values.clamp(min=float(values[-1]) * _RELATIVE_FLOOR) ** exponent
    scale = (values / values.mean()).sqrt()
    transform: Tensor = (vectors * scale).float()
    return transform


def apply_metric(rows: Tensor, transform: Tensor) -> Tensor:
    """Return float32 `rows [V, D] @ transform`, without a float32 copy of all rows."""
    result = torch.empty(rows.shape, dtype=torch.float32, device=rows.device)
    for start in range(0, len(rows), _CHUNK_ROWS):
        result[start : start + _CHUNK_ROWS] = rows[start : start + _CHUNK_ROWS].float() @ transform
    return result
