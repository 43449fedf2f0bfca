"""Offline clustering of an output embedding, and a rank's part of the result."""

from __future__ import annotations

from flashhead_dist.index.build import build_index, default_index_path, ensure_index
from flashhead_dist.index.options import HeadIndexError, IndexOptions
from flashhead_dist.index.shard import LoadedShard, TokenMap, load_shard
from flashhead_dist.index.store import IndexManifest, load_manifest

__all__ = [
    "HeadIndexError",
    "IndexManifest",
    "IndexOptions",
    "LoadedShard",
    "TokenMap",
    "build_index",
    "default_index_path",
    "ensure_index",
    "load_manifest",
    "load_shard",
]
