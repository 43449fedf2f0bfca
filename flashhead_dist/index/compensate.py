"""Rounding centroids so that errors cancel in the directions hidden states take.

After GPTQ (Frantar et al., https://arxiv.org/abs/2210.17323): columns are rounded one after
another, the column with the most energy first, and what a column loses is made up by those still to
come, as the second moment of the hidden states says. All centroids share that moment, so one
factorization serves them all. States of great norm along few directions, as Indic scripts have, are
where plain rounding hurts most.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashhead_kernels.quantize import (
    QuantizedCentroids,
    centroid_scales,
    integer_limit,
    pack_centroids,
)

_DAMPING = 0.01
_BLOCK_COLUMNS = 64


def quantize_for_states(
    centroids: Tensor, second_moment: Tensor, bits: int, group_size: int
) -> QuantizedCentroids:
    """Quantize float32 `centroids [..., D]` to 4 or 8 bits with least expected error of a score.

    second_moment: `[D, D]`, mean of h h^T over (unit-normed) hidden states.
    Scales are those of `quantize_centroids`; only the rounding differs.

    Raises:
        ValueError: what `centroid_scales` refuses, or centroids that are not finite.
    """
    if not bool(torch.isfinite(centroids).all()):
        raise ValueError("centroids must be finite: the output embedding holds NaN or inf")
    shape = centroids.shape
    flat = centroids.reshape(-1, shape[-1]).float()
    scales = centroid_scales(flat, bits, group_size)
    order, factor = _elimination(second_moment.to(flat.device))
    remaining = flat.T[order].contiguous()
    integers = torch.empty(remaining.shape, dtype=torch.int8, device=flat.device)
    limit = integer_limit(bits)
    # Columns are rows here, so that each step works on contiguous memory.
    column_scales = scales.float().T
    for start in range(0, shape[-1], _BLOCK_COLUMNS):
        stop = min(start + _BLOCK_COLUMNS, shape[-1])
        losses = torch.empty(stop - start, flat.shape[0], dtype=torch.float32, device=flat.device)
        for column in range(start, stop):
            scale = column_scales[int(order[column]) // group_size]
            quotient = torch.where(scale > 0, remaining[column] / scale, scale)
            rounded = quotient.round_().clamp_(-limit, limit)
            integers[column] = rounded.to(torch.int8)
            loss = (remaining[column] - rounded * scale) / factor[column, column]
            losses[column - start] = loss
            remaining[column + 1 : stop] -= factor[column, column + 1 : stop, None] * loss
        remaining[stop:] -= factor[start:stop, stop:].T @ losses
    restored = torch.empty_like(integers)
    restored[order] = integers
    return pack_centroids(
        restored.T.contiguous().reshape(shape),
        scales.reshape(*shape[:-1], -1),
        bits,
    )


def _elimination(second_moment: Tensor) -> tuple[Tensor, Tensor]:
    """Column order `[D]` and the upper Cholesky factor of the inverse moment in that order."""
    moment = second_moment.double()
    damping = _DAMPING * moment.diagonal().mean().clamp(min=1e-30)
    moment = moment + damping * torch.eye(len(moment), device=moment.device, dtype=moment.dtype)
    order = torch.argsort(moment.diagonal(), descending=True, stable=True)
    inverse = torch.linalg.inv(moment[order][:, order])
    return order, torch.linalg.cholesky(inverse, upper=True).float()
