"""A rank's rows in another precision, still in one piece."""

from __future__ import annotations

from dataclasses import replace

import torch

from flashhead_dist.index.shard import LoadedShard
from flashhead_kernels.cpu_threads import empty_on_large_pages


def with_row_dtype(loaded: LoadedShard, dtype: torch.dtype) -> LoadedShard:
    """`loaded` with clustered and pinned rows in `dtype`; itself where they are already.

    Its `table` is one piece, so that its rows can be scanned and looked up as one matrix.
    """
    shard = loaded.shard
    if shard.rows.dtype == dtype and shard.table is not None:
        return loaded
    clustered, pinned = shard.rows.flatten(0, 2), shard.pinned_rows.flatten(0, 1)
    shape = (len(clustered) + len(pinned), shard.rows.shape[-1])
    if shard.rows.device.type == "cpu":
        block = empty_on_large_pages(shape, dtype)
    else:
        block = shard.rows.new_empty(shape, dtype=dtype)
    block[: len(clustered)] = clustered
    block[len(clustered) :] = pinned
    rows = block[: len(clustered)].view(shard.rows.shape)
    pinned_rows = block[len(clustered) :].view(shard.pinned_rows.shape)
    return replace(loaded, shard=replace(shard, rows=rows, pinned_rows=pinned_rows))
