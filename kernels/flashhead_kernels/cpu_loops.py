"""The head's inner loops for a CPU, compiled by numba; `cpu` wraps them for torch tensors.

Each function takes flat arrays and a half-open range of groups or row blocks, holds no lock and
writes to places of its own, so `cpu` can hand ranges to threads. `state`s are float32 hidden
states. Results are per group (or per block of rows) and merged by the caller in a fixed order, so
that nothing depends on the number of threads.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from flashhead_kernels.cpu_primitives import (
    AHEAD_BYTES,
    best_left,
    insert_key,
    jit,
    pack_key,
    score_slots,
    select_slots,
)
from flashhead_kernels.llvm_row_dot import row_dot, row_dot_4
from flashhead_kernels.llvm_vectors import prefetch

_EMPTY = np.int64(-(2**63))
_LINE_BYTES = 64
ROW_BLOCK = 4096
"""Rows of a dense shard that make one partial result."""


@jit
def score_groups(
    first: int, last: int, query: Any, batch: int, values: Any, scales: Any,
    group_size: int, tile: int, spread: Any, bias: Any, clusters: int, scores: Any, stride: int,
) -> None:  # fmt: skip
    """Probing scores of groups `first..last` into `scores [B, stride]` (flat), the first at 0."""
    for group in range(first, last):
        for b in range(batch):
            at = b * stride + (group - first) * clusters
            base = group * clusters
            score_slots(
                values, base, base + clusters, scales, query, b, query[5], group_size, tile, scores,
                at,
            )  # fmt: skip
            for slot in range(clusters):
                scores[at + slot] += query[4][b]
                score = scores[at + slot] + bias[b] * spread[base + slot]
                # A cluster of pads has spread -inf: -inf * 0 would be NaN.
                scores[at + slot] = spread[base + slot] if spread[base + slot] < 0 else score


@jit
def scan_cluster(
    cluster: int, following: int, rows: Any, token_ids: Any, tokens: int, states: Any, b: int,
    size: int, k: int, best: Any, best_at: int, logits: Any, logits_at: int,
) -> None:  # fmt: skip
    """Score one cluster's tokens into `logits` (-inf for pads) and its keys into `best`."""
    step = _LINE_BYTES // rows.itemsize
    ahead = (following - cluster) * tokens * size
    if following >= 0:
        prefetch(token_ids, following * tokens)
    for j in range(cluster * tokens, (cluster + 1) * tokens):
        logit = np.float32(-np.inf)
        if following >= 0:
            # A row ahead of each row scored: a whole cluster at once overruns the fill buffers.
            for i in range(j * size + ahead, (j + 1) * size + ahead, step):
                prefetch(rows, i)
        if token_ids[j] >= 0:
            logit = row_dot(rows, j * size, states, b * size, size)[0]
            insert_key(best, best_at, k, pack_key(logit, token_ids[j]))
        logits[logits_at + j - cluster * tokens] = logit


@jit
def scan_clusters(
    first: int, last: int, rows: Any, token_ids: Any, tokens: int, states: Any, batch: int,
    size: int, cluster_ids: Any, k: int, best: Any, logits: Any,
) -> None:  # fmt: skip
    """Score clusters `cluster_ids [B, n]` (flat, -1: none) at positions first..last of `B * n`.

    best: keys `[positions, k]`, logits: `[positions, S]`, both flat.
    """
    per_row = cluster_ids.shape[0] // batch
    for position in range(first, last):
        cluster = cluster_ids[position]
        if cluster >= 0:
            following = -1
            if position + 1 < last:
                following = cluster_ids[position + 1]
            scan_cluster(
                cluster, following, rows, token_ids, tokens, states, position // per_row, size,
                k, best, position * k, logits, position * tokens,
            )  # fmt: skip


@jit
def probe_groups(
    first: int, last: int, query: Any, batch: int, size: int, values: Any, scales: Any,
    group_size: int, tile: int, spread: Any, bias: Any, clusters: int, probes: int, rows: Any,
    token_ids: Any, tokens: int, pinned_rows: Any, pinned_ids: Any, pinned: int, k: int,
    need_mass: bool, best: Any, peak: Any, mass: Any, left: Any,
) -> None:  # fmt: skip
    """The whole head for groups `first..last`: `score_groups`, then `scan_best_groups`.

    A phase at a time over all the groups, so that the scan of rows can look ahead across groups.
    """
    stride = (last - first) * clusters
    scores = np.empty(batch * stride, np.float32)
    score_groups(
        first, last, query, batch, values, scales, group_size, tile, spread, bias, clusters,
        scores, stride,
    )  # fmt: skip
    scan_best_groups(
        first, last, query, batch, size, spread, bias, clusters, probes, rows, token_ids, tokens,
        pinned_rows, pinned_ids, pinned, k, need_mass, scores, stride, best, peak, mass,
        left,
    )  # fmt: skip


@jit
def scan_best_groups(
    first: int, last: int, query: Any, batch: int, size: int, spread: Any, bias: Any, clusters: int,
    probes: int, rows: Any, token_ids: Any, tokens: int, pinned_rows: Any, pinned_ids: Any,
    pinned: int, k: int, need_mass: bool, scores: Any, stride: int, best: Any, peak: Any, mass: Any,
    left: Any,
) -> None:  # fmt: skip
    """Select each group's probes by `scores [B, stride]`, the first that of `first`, and scan them.

    best: int64 `[N, B, k]`; peak, mass: float32 `[N, B]`, the group's greatest exponent and its
    sum of exponentials relative to it; left: int64 `[N, B]`, the key of its best unprobed cluster,
    or empty where none is wanted. All flat.
    """
    groups = last - first
    ordered = np.empty(clusters, np.int32)
    slots = np.empty(groups * probes + 1, np.int64)
    logits = np.empty(probes * tokens + pinned, np.float32)
    for b in range(batch):
        for group in range(first, last):
            at = b * stride + (group - first) * clusters
            chosen = slots[(group - first) * probes : (group - first + 1) * probes]
            threshold = select_slots(scores[at : at + clusters], probes, ordered, chosen)
            if left.shape[0]:
                left[group * batch + b] = best_left(ordered, threshold, probes)
            for i in range(probes):
                chosen[i] += group * clusters
        slots[groups * probes] = -1
        for group in range(first, last):
            at = (group * batch + b) * k
            for i in range(at, at + k):
                best[i] = _EMPTY
            for i in range(probes):
                position = (group - first) * probes + i
                scan_cluster(
                    slots[position], slots[position + 1], rows, token_ids, tokens, query[0], b,
                    size, k, best, at, logits, i * tokens,
                )  # fmt: skip
            if pinned:
                scan_cluster(
                    group, -1, pinned_rows, pinned_ids, pinned, query[0], b, size,
                    k, best, at, logits, probes * tokens,
                )  # fmt: skip
            if need_mass:
                start = b * stride + (group - first) * clusters
                chosen = slots[(group - first) * probes : (group - first + 1) * probes]
                _closed_form_mass(
                    group * clusters, clusters, tokens, token_ids, scores[start : start + clusters],
                    chosen, spread, bias[b], logits, group * batch + b, peak, mass,
                )  # fmt: skip


@jit
def _closed_form_mass(
    base: int, clusters: int, tokens: int, token_ids: Any, scores: Any, chosen: Any, spread: Any,
    bias: float, logits: Any, at: int, peak: Any, mass: Any,
) -> None:  # fmt: skip
    """Mass of one group: scored logits exactly, unprobed clusters as `tokens * exp(h . mean)`."""
    for i in range(chosen.shape[0]):
        scores[chosen[i] - base] = -np.inf
    greatest = np.float32(-np.inf)
    for i in range(logits.shape[0]):
        greatest = max(greatest, logits[i])
    for slot in range(clusters):
        if scores[slot] > -np.inf:
            scores[slot] -= bias * spread[base + slot]
            greatest = max(greatest, scores[slot])
    total = np.float32(0)
    if greatest > -np.inf:
        for i in range(logits.shape[0]):
            total += math.exp(logits[i] - greatest)
        for slot in range(clusters):
            if scores[slot] > -np.inf:
                real = 0
                for j in range((base + slot) * tokens, (base + slot + 1) * tokens):
                    real += token_ids[j] >= 0
                total += real * math.exp(scores[slot] - greatest)
    peak[at] = greatest
    mass[at] = total


@jit
def merge_keys(best: Any, merged: Any) -> None:
    """The k greatest keys of each row of `best [parts, B, k]`, flat, into `merged [B, k]`."""
    batch, k = merged.shape
    flat = merged.ravel()
    flat[:] = _EMPTY
    for i in range(best.shape[0]):
        insert_key(flat, i // k % batch * k, k, best[i])


@jit
def scan_dense(
    first: int, last: int, rows: Any, count: int, states: Any, batch: int, size: int,
    token_ids: Any, first_token: int, k: int, need_mass: bool, best: Any, peak: Any, mass: Any,
) -> None:  # fmt: skip
    """Score row blocks `first..last` of `rows [count, D]`: every row against every state.

    token_ids: int32 `[count]`, -1 for a pad; empty where tokens count up from first_token.

    best: int64 `[blocks, B, k]`; peak, mass: float32 `[blocks, B]`. All flat.
    """
    logits = np.empty(batch, np.float32)
    step, ahead = _LINE_BYTES // rows.itemsize, AHEAD_BYTES // rows.itemsize
    for block in range(first, last):
        for i in range(block * batch * k, (block + 1) * batch * k):
            best[i] = _EMPTY
        for i in range(block * batch, (block + 1) * batch):
            peak[i] = -np.inf
            mass[i] = 0
        for row in range(block * ROW_BLOCK, min((block + 1) * ROW_BLOCK, count)):
            for i in range(row * size, (row + 1) * size, step):
                prefetch(rows, i + ahead)
            token = first_token + row
            if token_ids.shape[0]:
                token = token_ids[row]
            if token < 0:
                continue
            whole = batch - batch % 4
            for b in range(0, whole, 4):
                four = row_dot_4(rows, row * size, states, b * size, size)
                logits[b], logits[b + 1], logits[b + 2], logits[b + 3] = four
            for b in range(whole, batch):
                logits[b] = row_dot(rows, row * size, states, b * size, size)[0]
            for b in range(batch):
                at = block * batch + b
                insert_key(best, at * k, k, pack_key(logits[b], token))
                if need_mass:
                    if logits[b] > peak[at]:
                        mass[at] = mass[at] * math.exp(peak[at] - logits[b]) + np.float32(1)
                        peak[at] = logits[b]
                    else:
                        mass[at] += math.exp(logits[b] - peak[at])
