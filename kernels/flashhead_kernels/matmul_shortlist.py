"""The blocks of rows that can hold a batch's k greatest logits, found by the matrix library.

A library product is the fastest way through all rows for a large batch, but returns logits rounded
to the rows' dtype, in which one in a hundred argmaxes is a tie. Rounding keeps order, so the exact
k best are in the blocks whose best is within a margin of the k-th best block's.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding as llvm
import torch
from torch import Tensor

_SMALLEST_BATCH = {torch.bfloat16: 12, torch.float32: 16}
"""Where the product overtakes the fused scan, with one thread and with two, on an AMD EPYC (Zen 4)
at V=262,144, D=640: `docs/decisions.md` has the times."""

_RELATIVE_MARGIN = {torch.bfloat16: 2.0**-6, torch.float32: 2.0**-12}
_LONGEST = 64
BLOCK = 128
"""Rows that stand or fall together on a shortlist."""


def matmul_is_faster(hidden_states: Tensor, rows: Tensor) -> bool:
    """Whether the product serves this batch: same dtype, large enough, native arithmetic."""
    smallest = _SMALLEST_BATCH.get(rows.dtype)
    if smallest is None or hidden_states.dtype != rows.dtype or len(hidden_states) < smallest:
        return False
    features = llvm.get_host_cpu_features()
    return rows.dtype == torch.float32 or bool(
        features.get("avx512bf16") or features.get("amx-bf16")
    )


def matmul_shortlist(
    hidden_states: Tensor, rows: Tensor, k: int, pads: Tensor | None = None
) -> Tensor | None:
    """Blocks int64 `[B, n]` (-1: none) that hold the k greatest of `rows [count, D]`.

    Block i is rows `BLOCK * i ... BLOCK * (i + 1)`; count is a multiple of BLOCK. None where
    near-ties put more than 64 blocks on the list, or there are fewer than k blocks.

    pads: int64, rows that hold no token.

    The margin: a float32 sum of D products in another order differs by far less than one unit of
    bfloat16's last place, and a block's greatest logit is at least that of k - 1 others; four units
    below the k-th greatest block are kept.
    """
    if rows.shape[0] // BLOCK < k:
        return None
    logits = _product(hidden_states, rows)
    if pads is not None and len(pads):
        logits[:, pads] = float("-inf")
    greatest = logits.view(len(hidden_states), -1, BLOCK).amax(2).float()
    kth = greatest.topk(k, dim=1).values[:, -1:]
    scale = greatest.masked_fill(greatest == float("-inf"), 0).abs().amax(1, keepdim=True)
    near = greatest >= kth - scale * _RELATIVE_MARGIN[rows.dtype]
    counts = near.sum(1)
    longest = int(counts.max())
    if longest > _LONGEST:
        return None
    row, block = near.nonzero(as_tuple=True)
    first = counts.cumsum(0) - counts
    shortlist = torch.full((len(hidden_states), longest), -1, dtype=torch.int64)
    shortlist[row, torch.arange(len(row)) - first[row]] = block
    return shortlist


def _product(hidden_states: Tensor, rows: Tensor) -> Tensor:
    """All logits `[B, count]`; in float32 by oneDNN, where MKL takes up to twice as long."""
    available: Any = torch.backends.mkldnn.is_available
    if rows.dtype == torch.float32 and available():
        compute: Any = torch.ops.mkldnn._linear_pointwise
        product: Tensor = compute(hidden_states.contiguous(), rows, None, "none", [], "")
        return product
    return torch.nn.functional.linear(hidden_states, rows)
