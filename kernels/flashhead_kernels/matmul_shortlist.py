"""The rows that can hold a batch's k greatest logits, found by the matrix library.

A library product is the fastest way through all rows for a large batch, but returns logits rounded
to the rows' dtype, in which one in a hundred argmaxes is a tie. Rounding keeps order, so the exact
k best are among the rows within a margin of the k-th rounded logit.
"""

from __future__ import annotations

import llvmlite.binding as llvm
import torch
from torch import Tensor

_SMALLEST_BATCH = {torch.bfloat16: 8, torch.float32: 4}
"""Where the product overtakes the fused scan: measured with one thread on an AMD EPYC 9004 at
V=262,144, D=640. bfloat16: 23 against 42 ms at batch 4, 124 against 62 at 16."""

_RELATIVE_MARGIN = {torch.bfloat16: 2.0**-6, torch.float32: 2.0**-12}
_LONGEST = 256


def matmul_is_faster(hidden_states: Tensor, rows: Tensor) -> bool:
    """Whether the product serves this batch: same dtype, large enough, native arithmetic."""
    smallest = _SMALLEST_BATCH.get(rows.dtype)
    if smallest is None or hidden_states.dtype != rows.dtype or len(hidden_states) < smallest:
        return False
    features = llvm.get_host_cpu_features()
    return rows.dtype == torch.float32 or bool(
        features.get("avx512bf16") or features.get("amx-bf16")
    )


def matmul_shortlist(hidden_states: Tensor, rows: Tensor, k: int) -> Tensor | None:
    """Row numbers int64 `[B, n]` (-1: none) that hold the k greatest of `rows [count, D]`.

    None where near-ties make the list longer than 256 a row, or there are fewer than k rows.

    The margin: a float32 sum of D products in another order differs by far less than one unit of
    bfloat16's last place; two units on either side of the k-th value are kept.
    """
    if rows.shape[0] < k or k > _LONGEST:
        return None
    logits = torch.nn.functional.linear(hidden_states, rows)
    if k == 1:
        last = logits.amax(1, keepdim=True)
        largest = last.abs()
    else:
        last = logits.topk(k, dim=1).values[:, -1:]
        largest = logits.amax(1, keepdim=True).abs().maximum(last.abs())
    floor = last.float() - largest.float() * _RELATIVE_MARGIN[rows.dtype]
    near = logits >= floor.to(rows.dtype)
    counts = near.sum(1)
    longest = int(counts.max())
    if longest > _LONGEST:
        return None
    row, column = near.nonzero(as_tuple=True)
    shortlist = torch.full((len(hidden_states), longest), -1, dtype=torch.int64)
    first = counts.cumsum(0) - counts
    shortlist[row, torch.arange(len(row)) - first[row]] = column
    return shortlist
