"""`row_codes.coded_candidates` on a CPU: probes selected, int8 rows scanned, the best rescored."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashhead_kernels.candidates import check_candidate_arguments
from flashhead_kernels.cpu_loops import merge_keys, scan_cluster, score_groups
from flashhead_kernels.cpu_primitives import (
    insert_key,
    jit,
    pack_key,
    quantize_query,
    select_slots,
)
from flashhead_kernels.cpu_states import flat, make_query
from flashhead_kernels.llvm_integer_dot import dot_int8, dot_int8_4
from flashhead_kernels.llvm_row_dot import row_dot
from flashhead_kernels.llvm_vectors import prefetch
from flashhead_kernels.quantize import QuantizedCentroids
from flashhead_kernels.row_codes import KEPT, RowCodes

_EMPTY = np.int64(-(2**63))
_LINE_BYTES = 64
_OFFSET = 128
"""What `llvm_integer_dot` adds to an int8 to make it unsigned."""


def coded_candidates(
    hidden_states: Tensor,
    codes: RowCodes,
    rows: Tensor,
    token_ids: Tensor,
    centroids: QuantizedCentroids,
    spread: Tensor,
    alpha: float,
    num_probes_per_group: int,
    pinned_rows: Tensor,
    pinned_token_ids: Tensor,
    *,
    k: int = 1,
) -> Tensor:
    """See `row_codes.coded_candidates`; on this thread alone."""
    groups, clusters, tokens, size = rows.shape
    check_candidate_arguments(hidden_states, size, num_probes_per_group, clusters, k)
    batch, pinned = len(hidden_states), pinned_rows.shape[1]
    best = np.empty(groups * batch * k, np.int64)
    if batch:
        query, values, scales, bias = make_query(hidden_states, centroids, alpha)
        scores = np.empty(batch * groups * clusters, np.float32)
        score_groups(
            0, groups, query, batch, values, scales, centroids.group_size, centroids.tile,
            flat(spread), bias, clusters, scores, groups * clusters,
        )  # fmt: skip
        coded = _coded_query(query[0], batch, size, codes.group_size)
        data = flat(codes.data)
        _probe_coded_groups(
            groups, coded, batch, size, codes.group_size, clusters, num_probes_per_group,
            data.view(np.int8), data.view(np.uint16), flat(rows), flat(token_ids), tokens,
            flat(pinned_rows), flat(pinned_token_ids), pinned, k, max(KEPT, k), scores, best,
        )  # fmt: skip
    merged = np.empty((batch, k), np.int64)
    merge_keys(best, merged)
    return torch.from_numpy(merged)


def _coded_query(states: Any, batch: int, size: int, group_size: int) -> tuple[Any, Any, Any, Any]:
    """Float32 `states [B, D]` (flat), and what `quantize_query` makes of them for int8 rows."""
    groups = batch * (size // group_size)
    integers, starts = np.empty(batch * size, np.int8), np.empty(groups * 8, np.int32)
    factors = np.empty(groups, np.float32)
    quantize_query(states, group_size, _OFFSET, integers, starts, factors)
    return states, integers, starts, factors


@jit
def _scan_coded(
    cluster: int, following: int, codes: Any, scales: Any, token_ids: Any, tokens: int, query: Any,
    b: int, size: int, group_size: int, kept: int, best: Any, best_at: int, logits: Any,
) -> None:  # fmt: skip
    """Score one cluster's int8 rows; keys of (logit, place of the row) into `best`.

    codes, scales: the same bytes as int8 and as uint16; query: float32 states, int8 states, starts
    and factors for `group_size` columns. logits: float32 `[S]`, a scratch.
    """
    n = size // group_size
    stride = tokens * (size + 2 * n)
    at, scale_at = cluster * stride, (cluster * stride + tokens * size) // 2
    if following >= 0:
        prefetch(token_ids, following * tokens)
    ahead = (following - cluster) * stride
    done = 0
    while done < tokens:
        width = 4 if done + 4 <= tokens else 1
        if following >= 0:
            low, high = at + done * stride // tokens, at + (done + width) * stride // tokens
            for i in range(low + ahead, high + ahead, _LINE_BYTES):
                prefetch(codes, i)
        if width == 4:
            logits[done], logits[done + 1], logits[done + 2], logits[done + 3] = dot_int8_4(
                codes, at + done * size, scales, scale_at + done * n, query[1], b * size, query[2],
                b * n * 8, query[3], b * n, n, group_size,
            )  # fmt: skip
        else:
            logits[done] = dot_int8(
                codes, at + done * size, scales, scale_at + done * n, query[1], b * size, query[2],
                b * n * 8, query[3], b * n, n, group_size,
            )[0]  # fmt: skip
        done += width
    for j in range(tokens):
        place = cluster * tokens + j
        if token_ids[place] >= 0:
            insert_key(best, best_at, kept, pack_key(logits[j], place))


@jit
def _probe_coded_groups(
    groups: int, query: Any, batch: int, size: int, group_size: int, clusters: int, probes: int,
    codes: Any, scales: Any, rows: Any, token_ids: Any, tokens: int, pinned_rows: Any,
    pinned_ids: Any, pinned: int, k: int, kept: int, scores: Any, best: Any,
) -> None:  # fmt: skip
    """Select each group's probes by `scores [B, N, M]`, scan their codes, rescore the best.

    best: int64 `[N, B, k]`, flat.
    """
    ordered = np.empty(clusters, np.int32)
    slots = np.empty(groups * probes + 1, np.int64)
    logits = np.empty(max(tokens, pinned), np.float32)
    short = np.empty(groups * kept, np.int64)
    for b in range(batch):
        for group in range(groups):
            at = (b * groups + group) * clusters
            chosen = slots[group * probes : (group + 1) * probes]
            select_slots(scores[at : at + clusters], probes, ordered, chosen)
            for i in range(probes):
                chosen[i] += group * clusters
        slots[groups * probes] = -1
        short[:] = _EMPTY
        for position in range(groups * probes):
            _scan_coded(
                slots[position], slots[position + 1], codes, scales, token_ids, tokens, query, b,
                size, group_size, kept, short, position // probes * kept, logits,
            )  # fmt: skip
        _rescore(query, batch, b, size, rows, token_ids, short, kept, k, best)
        if pinned:
            for group in range(groups):
                scan_cluster(
                    group, -1, pinned_rows, pinned_ids, pinned, query[0], b, size, k, best,
                    (group * batch + b) * k, logits, 0,
                )  # fmt: skip


@jit
def _rescore(
    query: Any, batch: int, b: int, size: int, rows: Any, token_ids: Any, short: Any, kept: int,
    k: int, best: Any,
) -> None:  # fmt: skip
    """Exact keys of the rows whose places `short [N, kept]` holds, into `best`."""
    step = _LINE_BYTES // rows.itemsize
    for i in range(short.shape[0]):
        at = (i // kept * batch + b) * k
        if i % kept == 0:
            for j in range(at, at + k):
                best[j] = _EMPTY
        if i + 2 < short.shape[0]:
            ahead = np.int64(0xFFFFFFFF) - (short[i + 2] & np.int64(0xFFFFFFFF))
            if short[i + 2] != _EMPTY:
                for j in range(ahead * size, (ahead + 1) * size, step):
                    prefetch(rows, j)
        if short[i] != _EMPTY:
            place = np.int64(0xFFFFFFFF) - (short[i] & np.int64(0xFFFFFFFF))
            logit = row_dot(rows, place * size, query[0], b * size, size)[0]
            insert_key(best, at, k, pack_key(logit, token_ids[place]))
