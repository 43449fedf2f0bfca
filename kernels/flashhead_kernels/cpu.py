"""The head's operations on a CPU: the names and signatures of `reference`, on compiled loops.

Rows and centroids are read once, in their stored precision, with float32 accumulation in an order
that depends on nothing but the hidden size. Work is shared over `torch.get_num_threads()` threads.
A torch operator that meets a cold cache costs some forty microseconds, and a step of the head takes
two milliseconds: so no step of a few rows calls one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import llvmlite.binding as llvm
import numpy as np
import torch
from torch import Tensor

from flashhead_kernels import cpu_loops as loops
from flashhead_kernels import reference
from flashhead_kernels.cpu_loops import jit, quantize_query
from flashhead_kernels.cpu_threads import share
from flashhead_kernels.keys import EMPTY_KEY
from flashhead_kernels.keys import unpack_keys_into as unpack_keys_into
from flashhead_kernels.llvm_dots import row_dot
from flashhead_kernels.llvm_vectors import bfloat16_value
from flashhead_kernels.noise import PLAIN, FinalLogits
from flashhead_kernels.quantize import QuantizedCentroids
from flashhead_kernels.reference import best_keys as best_keys
from flashhead_kernels.reference import select_probes as select_probes
from flashhead_kernels.shard import (
    Candidates,
    IndexShard,
    Query,
    check_hidden_states,
    check_k,
    check_query,
)

StateArrays = tuple[Any, Any, Any, Any, Any, int]
"""Flat arrays: float32 states, int8 states, starts and factors (see `quantize_query`), and what is
added to every score of a row; last, the columns of a centroid."""

_NUMPY_VIEW = {torch.bfloat16: torch.uint16, torch.float16: torch.int16}
_EXPONENT = {
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float16: (torch.int16, 0x7C00),
    torch.float32: (torch.int32, 0x7F800000),
}
_EMPTY = np.int64(-(2**63))
_MINUS_INFINITY_BITS = np.int32(-0x800000)


def flat(tensor: Tensor) -> Any:
    """A flat numpy view; bfloat16 as uint16 and float16 as int16, told apart by `llvm_row_dot`."""
    if not tensor.is_contiguous():
        raise ValueError("weights and index tensors must be contiguous")
    view = _NUMPY_VIEW.get(tensor.dtype)
    return (tensor if view is None else tensor.view(view)).view(-1).numpy()


def all_finite(hidden_states: Tensor) -> bool:
    """See `reference.all_finite`."""
    view, exponent = _EXPONENT[hidden_states.dtype]
    return bool(_no_full_exponent(hidden_states.contiguous().view(view).numpy(), exponent))


def float_states(hidden_states: Tensor) -> Any:
    """Hidden states as a flat float32 array."""
    if hidden_states.dtype is not torch.bfloat16:
        return hidden_states.float().contiguous().view(-1).numpy()
    states = np.empty(hidden_states.numel(), np.float32)
    _widen(flat(hidden_states.contiguous()), states)
    return states


def make_query(
    hidden_states: Tensor, centroids: QuantizedCentroids, alpha: float
) -> tuple[StateArrays, Any, Any, Any]:
    """Hidden states in the forms that centroids are scored with, flat centroids, and the bias.

    bias: float32 `[B]`, alpha * |h|. Centroids of fewer columns (`QuantizedCentroids.projection`)
    meet the states in their coordinates, projected here in an order that depends on D alone.
    """
    batch, size = hidden_states.shape
    states, bias = float_states(hidden_states), np.empty(batch, np.float32)
    columns, probing, added = size, states, np.zeros(batch, np.float32)
    if centroids.projection is not None:
        columns, projection = centroids.hidden_size, centroids.projection
        probing = np.empty(batch * columns, np.float32)
        _project(
            states, size, flat(projection.to_state), flat(projection.mean), columns, probing, added
        )
    rounded = 0 if centroids.scales is None else batch
    groups = rounded * (columns // centroids.group_size)
    integers = np.empty(rounded * columns, np.int8)
    starts = np.empty(groups * 8, np.int32)
    factors = np.empty(groups, np.float32)
    offset = 8 if centroids.bits == 4 else 128
    _fill_query(
        states, size, alpha, bias, probing, centroids.group_size, offset, integers, starts, factors
    )
    scales = np.empty(0, np.uint16) if centroids.scales is None else flat(centroids.scales)
    query = (states, integers, starts, factors, added, columns)
    return query, flat(centroids.values), scales, bias


def unpack_keys(keys: Tensor) -> tuple[Tensor, Tensor]:
    """See `keys.unpack_keys`; for keys `[B, k]`."""
    packed = keys.contiguous().numpy()
    logits, ids = np.empty(packed.shape, np.float32), np.empty(packed.shape, np.int64)
    _unpack(packed, logits.view(np.int32), ids)
    return torch.from_numpy(logits), torch.from_numpy(ids)


@jit
def _widen(bits: Any, states: Any) -> None:
    for i in range(bits.shape[0]):
        states[i] = bfloat16_value(bits[i])


@jit
def _no_full_exponent(bits: Any, exponent: int) -> Any:
    """Whether no float has all bits of its exponent set, as NaN and inf have."""
    full = 0
    for number in bits.ravel():
        full += (number & exponent) == exponent
    return full == 0


@jit
def _project(
    states: Any, size: int, to_state: Any, mean: Any, columns: int, probing: Any, added: Any
) -> None:
    for b in range(added.shape[0]):
        for column in range(columns):
            found = row_dot(to_state, column * size, states, b * size, size)[0]
            probing[b * columns + column] = found
        added[b] = row_dot(mean, 0, states, b * size, size)[0]


@jit
def _fill_query(
    states: Any, size: int, alpha: float, bias: Any, probing: Any, group_size: int, offset: int,
    integers: Any, starts: Any, factors: Any,
) -> None:  # fmt: skip
    quantize_query(probing, group_size, offset, integers, starts, factors)
    for b in range(bias.shape[0]):
        squares = 0.0
        for i in range(b * size, (b + 1) * size):
            squares += states[i] * np.float64(states[i])
        bias[b] = np.float32(alpha * math.sqrt(squares))


@jit
def _unpack(keys: Any, bits: Any, ids: Any) -> None:
    for b in range(keys.shape[0]):
        for i in range(keys.shape[1]):
            key = keys[b, i]
            ordered = np.int32(key >> 32)
            bits[b, i] = ordered ^ ((ordered >> 31) & np.int32(0x7FFFFFFF))
            ids[b, i] = 0xFFFFFFFF - (key & 0xFFFFFFFF)
            if key == _EMPTY:
                bits[b, i] = _MINUS_INFINITY_BITS
                ids[b, i] = -1


_SMALLEST_BATCH = {torch.bfloat16: 12, torch.float32: 16}
"""Where the product overtakes the fused scan, with one thread and with two, on an AMD EPYC (Zen 4)
at V=262,144, D=640: `docs/decisions` has the times."""

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


def score_centroids(hidden_states: Tensor, shard: IndexShard, alpha: float) -> Tensor:
    """See `reference.score_centroids`."""
    (groups, clusters), centroids = shard.spread.shape, shard.centroids
    batch = len(hidden_states)
    query, values, scales, bias = make_query(hidden_states, centroids, alpha)
    scores = np.empty(batch * groups * clusters, np.float32)
    if batch:
        spread = flat(shard.spread)
        share(
            groups,
            lambda first, last: loops.score_groups(
                first, last, query, batch, values, scales, centroids.group_size,
                centroids.tile, spread, bias, clusters, scores[first * clusters :],
                groups * clusters,
            ),
        )  # fmt: skip
    return torch.from_numpy(scores).view(batch, groups, clusters)


def score_rows(hidden_states: Tensor, rows: Tensor, cluster_ids: Tensor) -> Tensor:
    """See `reference.score_rows`."""
    token_ids = torch.zeros(rows.shape[:2], dtype=torch.int32)
    return _scan(hidden_states, rows, token_ids, cluster_ids, 1)[1]


def probed_candidates(
    hidden_states: Tensor, rows: Tensor, token_ids: Tensor, cluster_ids: Tensor, *, k: int = 1
) -> Tensor:
    """See `reference.probed_candidates`."""
    keys, _ = _scan(hidden_states, rows, token_ids, cluster_ids, k)
    return _greatest(keys.flatten(1), k)


def _scan(
    hidden_states: Tensor, rows: Tensor, token_ids: Tensor, cluster_ids: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    batch, count = cluster_ids.shape
    tokens, size = rows.shape[1:]
    best = np.full(batch * count * k, EMPTY_KEY, np.int64)
    logits = np.full(batch * count * tokens, -np.inf, np.float32)
    if batch * count:
        states, flat_rows, ids = float_states(hidden_states), flat(rows), flat(token_ids)
        clusters = flat(cluster_ids.to(torch.int64).contiguous())
        share(
            batch * count,
            lambda first, last: loops.scan_clusters(
                first, last, flat_rows, ids, tokens, states, batch, size, clusters, k, best, logits
            ),
        )
    return (
        torch.from_numpy(best).view(batch, count, k),
        torch.from_numpy(logits).view(batch, count, tokens),
    )


def candidates(
    hidden_states: Tensor,
    shard: IndexShard,
    query: Query,
    *,
    between: Callable[[], object] | None = None,
) -> Candidates:
    """See `reference.candidates`."""
    check_query(hidden_states, shard, query)
    groups, clusters, tokens, size = shard.rows.shape
    batch, k, centroids = hidden_states.shape[0], query.k, shard.centroids
    best = np.empty(groups * batch * k, np.int64)
    peak, mass = np.empty((2, groups * batch), np.float32)
    left = np.empty(groups * batch * query.need_unprobed, np.int64)
    if batch:
        states, values, scales, bias = make_query(hidden_states, centroids, query.alpha)
        spread = flat(shard.spread)
        of_centroids = (values, scales, centroids.group_size, centroids.tile, spread)
        of_rows = (
            query.num_probes_per_group, flat(shard.rows), flat(shard.token_ids), tokens,
            flat(shard.pinned_rows), flat(shard.pinned_token_ids), shard.pinned_rows.shape[1], k,
            query.need_logsumexp,
        )  # fmt: skip
        if between is None:
            share(
                groups,
                lambda first, last: loops.probe_groups(
                    first, last, states, batch, size, *of_centroids, bias, clusters, *of_rows, best,
                    peak, mass, left,
                ),
            )  # fmt: skip
        else:
            stride = groups * clusters
            scores = np.empty(batch * stride, np.float32)
            share(
                groups,
                lambda first, last: loops.score_groups(
                    first, last, states, batch, *of_centroids, bias, clusters,
                    scores[first * clusters :], stride,
                ),
            )  # fmt: skip
            between()
            share(
                groups,
                lambda first, last: loops.scan_best_groups(
                    first, last, states, batch, size, spread, bias, clusters, *of_rows,
                    scores[first * clusters :], stride, best, peak, mass, left,
                ),
            )  # fmt: skip
    found = _merge(best, peak, mass, batch, k, query.need_logsumexp)
    if not query.need_unprobed:
        return found
    unprobed = np.empty((batch, 1), np.int64)
    loops.merge_keys(left, unprobed)
    return replace(found, unprobed=torch.from_numpy(unprobed)[:, 0])


def dense_candidates(
    hidden_states: Tensor,
    rows: Tensor,
    first_token_id: int,
    *,
    k: int = 1,
    need_logsumexp: bool = False,
    token_ids: Tensor | None = None,
    final: FinalLogits = PLAIN,
) -> Candidates:
    """See `reference.dense_candidates`, which final logits are left to.

    A large batch goes through the matrix library first, where that is faster: its logits, rounded
    to the rows' dtype, only choose the rows that are then scored exactly.
    """
    if not final.is_plain:
        return reference.dense_candidates(
            hidden_states, rows, first_token_id, k=k, need_logsumexp=need_logsumexp,
            token_ids=token_ids, final=final,
        )  # fmt: skip
    count, size = rows.shape
    check_hidden_states(hidden_states, size)
    check_k(k)
    whole = count - count % BLOCK
    if not need_logsumexp and matmul_is_faster(hidden_states, rows):
        blocks_of_rows = rows[:whole].view(-1, BLOCK, size)
        ids = token_ids
        if ids is None:
            ids = torch.arange(first_token_id, first_token_id + count, dtype=torch.int32)
        pads = None if token_ids is None else (token_ids[:whole] < 0).nonzero()[:, 0]
        cluster_ids = matmul_shortlist(hidden_states, rows[:whole], k, pads)
        if cluster_ids is not None:
            keys = probed_candidates(
                hidden_states, blocks_of_rows, ids[:whole].view(-1, BLOCK), cluster_ids, k=k
            )
            rest = _scan_dense(hidden_states, rows[whole:], ids[whole:], 0, k, False)
            return Candidates(_greatest(torch.cat([keys, rest.keys], dim=1), k), None)
    ids = hidden_states.new_empty(0, dtype=torch.int32) if token_ids is None else token_ids
    return _scan_dense(hidden_states, rows, ids, first_token_id, k, need_logsumexp)


def _scan_dense(
    hidden_states: Tensor,
    rows: Tensor,
    token_ids: Tensor,
    first_token_id: int,
    k: int,
    need_logsumexp: bool,
) -> Candidates:
    """token_ids: of the rows, or empty where they count up from first_token_id."""
    count, size = rows.shape
    batch, blocks = hidden_states.shape[0], -(-count // loops.ROW_BLOCK)
    best = np.empty(blocks * batch * k, np.int64)
    peak, mass = np.empty((2, blocks * batch), np.float32)
    if batch:
        states, flat_rows, ids = float_states(hidden_states), flat(rows), flat(token_ids)
        share(
            blocks,
            lambda first, last: loops.scan_dense(
                first, last, flat_rows, count, states, batch, size, ids, first_token_id, k,
                need_logsumexp, best, peak, mass,
            ),
        )  # fmt: skip
    return _merge(best, peak, mass, batch, k, need_logsumexp)


def _merge(
    best: np.ndarray[Any, Any],
    peak: np.ndarray[Any, Any],
    mass: np.ndarray[Any, Any],
    batch: int,
    k: int,
    need_logsumexp: bool,
) -> Candidates:
    """Reduce flat partial results `[parts, B, ...]` over their parts, in order."""
    merged = np.empty((batch, k), np.int64)
    loops.merge_keys(best, merged)
    keys = torch.from_numpy(merged)
    if not need_logsumexp:
        return Candidates(keys, None)
    if batch == 0:
        return Candidates(keys, torch.empty(0))
    peaks = torch.from_numpy(peak).view(-1, batch).double()
    masses = torch.from_numpy(mass).view(-1, batch).double()
    return Candidates(keys, (peaks + masses.log()).logsumexp(0).float())


def _greatest(keys: Tensor, k: int) -> Tensor:
    if keys.shape[1] < k:
        filler = keys.new_full((keys.shape[0], k - keys.shape[1]), EMPTY_KEY)
        keys = torch.cat([keys, filler], dim=1)
    return keys.amax(1, keepdim=True) if k == 1 else keys.topk(k, dim=1).values
