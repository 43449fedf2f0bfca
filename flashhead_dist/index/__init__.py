"""Offline clustering of an output embedding, and a rank's part of the result."""

from __future__ import annotations

from flashhead_dist.index.build import build_index
from flashhead_dist.index.locate import default_index_path, ensure_index
from flashhead_dist.index.manifest import IndexManifest, load_manifest
from flashhead_dist.index.options import HeadIndexError, IndexOptions
from flashhead_dist.index.shard import LoadedShard, load_shard
from flashhead_dist.index.token_map import TokenMap

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
