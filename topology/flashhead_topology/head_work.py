"""What one step of each head reads, computes and sends on the rank that does most.

The bytes are those that the heads themselves report (`Head.read_bytes_per_step`, `weight_bytes`,
`payload_bytes_per_row`): a test compares them. Rows of a batch are taken to probe different
clusters, up to all of them, so that at larger batches they are an upper bound.

Letters: V vocabulary, D hidden size, B rows of the batch, P tp_size, C clusters of S tokens in G
probing groups, p probes, N groups of the rank. Units: bytes and floating-point operations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from flashhead_topology.head_shape import HeadShape, HeadWork, Part, Sent
from flashhead_topology.machine import DeviceType

DEFAULT_BATCH_OF_ONE_LAUNCH = 8
"""Rows up to which the CUDA head takes one launch: `flashhead_kernels.triton_shapes`."""
KEY_BYTES = 8
_SCORE_BYTES = 4
_ID_BYTES = 4
_SPREAD_BYTES = 4
_FAISS_ID_BYTES = 8
_FAISS_SHARE = 0.15
_UNPACK: dict[DeviceType, int] = {"cuda": 10, "cpu": 1}
"""Unpacking a key is plain torch on CUDA."""
_JUDGING: dict[DeviceType, int] = {"cuda": 4, "cpu": 4}
"""What flashhead_escalate adds: one tensor of two keys, a margin, and which lie below."""


def _launches(cuda: int, cpu: int, *, unpacks: bool = False) -> dict[DeviceType, int]:
    own: dict[DeviceType, int] = {"cuda": cuda, "cpu": cpu}
    return {device: n + _UNPACK[device] * unpacks for device, n in own.items()}


def head_work(head_name: str, shape: HeadShape, tp_size: int, batch_size: int) -> HeadWork:
    """The work of `head_name` on the rank that does most, for a batch of `batch_size` >= 1.

    `flashhead_auto` has two ways; this is retrieval, `scan_work` the other.

    Raises:
        ValueError: an unknown head, a size below 1, more ranks than the head can be split over, a
            retrieval head and no index.
    """
    if head_name not in _WORK:
        raise ValueError(f"there is no head named {head_name!r}: choose one of {', '.join(_WORK)}")
    _check_sizes(head_name, shape, tp_size, batch_size)
    return _WORK[head_name](shape, tp_size, batch_size)


def _check_sizes(head_name: str, shape: HeadShape, tp_size: int, batch_size: int) -> None:
    for name, size in (("tp_size", tp_size), ("batch_size", batch_size)):
        if size < 1:
            raise ValueError(f"{name} is {size}: it must be at least 1")
    limit, what = shape.vocab_size, "tokens"
    if head_name == "dense_allreduce":
        limit, what = shape.hidden_size, "columns"
    elif head_name.startswith("flashhead"):
        if not shape.num_clusters:
            raise ValueError(f"{head_name} needs an index: give num_clusters and num_probes")
        limit, what = min(shape.num_groups, shape.vocab_size), "probing groups"
    if tp_size > limit and head_name != "flashhead_replicated":
        raise ValueError(
            f"{head_name} splits {limit} {what} and cannot use {tp_size} ranks: choose fewer"
        )


def _keys(batch: int) -> Sent:
    return Sent("all_reduce", KEY_BYTES * batch, KEY_BYTES, keys=True)


def _rows_part(shape: HeadShape, rows: int, batch: int) -> Part:
    return Part(rows * shape.row_bytes, 2.0 * batch * rows * shape.hidden_size)


def _dense_local_max(shape: HeadShape, tp_size: int, batch: int) -> HeadWork:
    rows = -(-shape.vocab_size // tp_size)
    part = _rows_part(shape, rows, batch)
    return HeadWork(
        {"head/candidates": part},
        (_keys(batch),),
        _launches(1, 1, unpacks=True),
        rows * shape.row_bytes,
    )


def _dense_gather(shape: HeadShape, tp_size: int, batch: int) -> HeadWork:
    width = -(-shape.vocab_size // tp_size)
    logits = width * batch * shape.logit_bytes
    part = replace(_rows_part(shape, width, batch), scratch_bytes=float(logits))
    # argmax reads all logits, after a copy into order where there are several rows.
    passes = 1 if batch == 1 else 3
    result = Part(0.0, 0.0, scratch_bytes=float(passes * logits * tp_size))
    launches = 5 + (batch > 1 and tp_size > 1)
    return HeadWork(
        {"head/candidates": part, "head/result": result},
        (Sent("all_gather", logits, shape.logit_bytes),),
        _launches(launches, launches),
        width * shape.row_bytes,
    )


def _dense_allreduce(shape: HeadShape, tp_size: int, batch: int) -> HeadWork:
    columns = -(-shape.hidden_size // tp_size)
    weights = shape.vocab_size * columns * shape.row_bits // 8
    logits = shape.vocab_size * batch * shape.logit_bytes
    part = Part(weights, 2.0 * batch * shape.vocab_size * columns, scratch_bytes=float(logits))
    return HeadWork(
        {"head/candidates": part, "head/result": Part(0.0, 0.0, scratch_bytes=float(logits))},
        (Sent("all_reduce", logits, shape.logit_bytes),),
        _launches(5, 5),
        weights,
    )


def _index_work(
    shape: HeadShape, groups: int, local_probes: int, batch: int
) -> tuple[dict[str, Part], int]:
    """Parts and bytes of a rank with `groups` probing groups, each row probing `local_probes`."""
    clusters = groups * (shape.num_clusters // shape.num_groups)
    probed = min(batch * local_probes, clusters)
    row = shape.row_bytes + _ID_BYTES
    pinned = groups * shape.pinned_per_group
    scored = batch * (local_probes * shape.cluster_size + pinned)
    columns = shape.centroid_columns or shape.hidden_size
    projected = shape.centroid_columns * shape.hidden_size
    parts = {
        "head/centroids": Part(
            clusters * (shape.centroid_bytes + _SPREAD_BYTES) + shape.projection_bytes,
            2.0 * batch * (clusters * columns + projected),
        ),
        "head/candidates": Part(
            probed * shape.cluster_size * row + pinned * row,
            2.0 * scored * shape.hidden_size,
            gathered=True,
        ),
    }
    held = clusters * (shape.cluster_size * row + shape.centroid_bytes + _SPREAD_BYTES)
    return parts, held + pinned * row + shape.projection_bytes


def _flashhead(shape: HeadShape, tp_size: int, batch: int) -> HeadWork:
    groups = -(-shape.num_groups // tp_size)
    local_probes = -(-shape.num_probes // shape.num_groups) * groups
    parts, held = _index_work(shape, groups, local_probes, batch)
    fused = 1 if batch <= DEFAULT_BATCH_OF_ONE_LAUNCH else 2
    return HeadWork(parts, (_keys(batch),), _launches(fused, 1, unpacks=True), held)


def scan_work(shape: HeadShape, tp_size: int, batch: int) -> HeadWork:
    """`flashhead_auto` where it scans its rows: the bytes of all rows and ids, no centroids."""
    _check_sizes("flashhead_auto", shape, tp_size, batch)
    work = _flashhead(shape, tp_size, batch)
    groups = -(-shape.num_groups // tp_size)
    clusters = groups * (shape.num_clusters // shape.num_groups)
    rows = clusters * shape.cluster_size + groups * shape.pinned_per_group
    part = Part(rows * (shape.row_bytes + _ID_BYTES), 2.0 * batch * rows * shape.hidden_size)
    launches = _launches(1, 1, unpacks=True)
    return replace(work, parts={"head/candidates": part}, launches=launches)


def _flashhead_escalate(shape: HeadShape, tp_size: int, batch: int) -> HeadWork:
    """Two keys a row, and on average the second round of the share of rows that escalates.

    Launches are those of the first round; on CUDA the host waits to know which rows escalate, which
    no cost stands for.
    """
    work = _flashhead(shape, tp_size, batch)
    share = shape.escalated_share
    any_row = 1 - (1 - share) ** batch
    parts = dict(work.parts)
    if shape.escalated_probes:
        wider = replace(shape, num_probes=shape.escalated_probes)
        alone = _flashhead(wider, tp_size, 1).parts["head/candidates"]
        again = _flashhead(wider, tp_size, 1).parts["head/centroids"]
        groups = -(-shape.num_groups // tp_size)
        row = shape.row_bytes + _ID_BYTES
        pinned = groups * shape.pinned_per_group * row
        clusters = groups * (shape.num_clusters // shape.num_groups)
        most = clusters * shape.cluster_size * row
        probed = min(share * batch * (alone.read_bytes - pinned), any_row * most)
        parts["head/centroids"] = _plus(parts["head/centroids"], again, any_row)
        rows = replace(alone, read_bytes=0.0)
        parts["head/candidates"] = _plus(parts["head/candidates"], rows, share * batch)
        read = parts["head/candidates"].read_bytes + any_row * pinned + probed
        parts["head/candidates"] = replace(parts["head/candidates"], read_bytes=read)
    else:
        scan = scan_work(shape, tp_size, 1).parts["head/candidates"]
        parts["head/candidates"] = _plus(parts["head/candidates"], scan, any_row)
    exchanges = [Sent("all_reduce", 2 * KEY_BYTES * batch, KEY_BYTES, keys=True)]
    if share:
        rows_then = max(1, round(share * batch / any_row))
        exchanges.append(replace(_keys(rows_then), times=any_row))
    launches = {device: number + _JUDGING[device] for device, number in work.launches.items()}
    return replace(work, parts=parts, exchanges=tuple(exchanges), launches=launches)


def _plus(part: Part, other: Part, times: float) -> Part:
    """`part`, and `other` as often as `times` says."""
    return replace(
        part,
        read_bytes=part.read_bytes + times * other.read_bytes,
        flops=part.flops + times * other.flops,
    )


def _flashhead_replicated(shape: HeadShape, tp_size: int, batch: int) -> HeadWork:
    return replace(_flashhead(shape, 1, batch), exchanges=())


def _flashhead_global(shape: HeadShape, tp_size: int, batch: int) -> HeadWork:
    groups = -(-shape.num_groups // tp_size)
    local_probes = -(-shape.num_probes * groups // shape.num_groups)
    parts, held = _index_work(shape, groups, local_probes, batch)
    scores = groups * (shape.num_clusters // shape.num_groups) * batch * _SCORE_BYTES
    parts["head/result"] = Part(0.0, 0.0, scratch_bytes=2.0 * scores * tp_size)
    # Centroids and rows are scored by kernels; the choice among all ranks' scores is plain torch.
    launches = _launches(96, 50 + (batch > 1), unpacks=True)
    sent = Sent("all_gather", scores, _SCORE_BYTES)
    return HeadWork(parts, (sent, _keys(batch)), launches, held)


def _faiss_ivf(shape: HeadShape, tp_size: int, batch: int) -> HeadWork:
    rows = -(-shape.vocab_size // tp_size)
    lists = 2 ** math.floor(math.log2(4 * math.sqrt(rows))) if rows > 64 else 1
    row = shape.row_bytes + _FAISS_ID_BYTES
    centroids = lists * shape.hidden_size * 4
    if shape.num_clusters:
        index_bytes = shape.num_clusters * shape.centroid_bytes + shape.projection_bytes
        index_bytes += shape.num_probes * shape.cluster_size * shape.row_bytes
        budget = index_bytes // tp_size
    else:
        budget = round(_FAISS_SHARE * shape.vocab_size * shape.row_bytes / tp_size)
    per_list = rows / lists * row
    probes = max(1, min(lists, round((budget - centroids) / per_list)))
    probed = round(min(batch * probes, lists) * per_list)
    size = shape.hidden_size
    parts = {
        "head/centroids": Part(centroids, 2.0 * batch * lists * size),
        "head/candidates": Part(probed, 2.0 * batch * probes * rows / lists * size, gathered=True),
    }
    # What torch does around the search was counted; two kernels of faiss's own are a guess.
    launches = _launches(26, 26, unpacks=True)
    return HeadWork(parts, (_keys(batch),), launches, centroids + rows * row)


_WORK: dict[str, Callable[[HeadShape, int, int], HeadWork]] = {
    "dense_gather": _dense_gather,
    "dense_allreduce": _dense_allreduce,
    "dense_local_max": _dense_local_max,
    "flashhead_replicated": _flashhead_replicated,
    "flashhead_global": _flashhead_global,
    "flashhead": _flashhead,
    "flashhead_auto": _flashhead,
    "flashhead_escalate": _flashhead_escalate,
    "faiss_ivf": _faiss_ivf,
}
HEAD_NAMES = tuple(_WORK)
