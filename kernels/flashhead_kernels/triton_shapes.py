"""Shapes that a Triton kernel is compiled for, and the launch that goes with them."""

from __future__ import annotations

import os
from dataclasses import dataclass

from flashhead_kernels.quantize import QuantizedCentroids

MAX_BATCH_IN_ONE_LAUNCH = 8
MAX_BEST = 64
"""Keys that a kernel keeps for each row."""
HEAD_WARPS = 16
"""Warps of every program that scores rows or norms: their float sums depend on it."""
_WORDS_A_THREAD = 32
_ROWS_A_BLOCK = 64
_COLUMNS_A_BLOCK = 128
_KEYS_A_BLOCK = 1024


def power_of_two(size: int) -> int:
    """The power of two at or above `size`, 1 at least."""
    return 1 << max(0, size - 1).bit_length()


@dataclass(frozen=True)
class CentroidShape:
    """How a rank's integer centroids lie in memory, for a kernel; `words` of `width` bytes.

    groups: scale groups of a row, `group_size` columns and `words` words each; `*_pad` are the
    powers of two at or above. chunk: scale groups a loop step; at most two, whose sum has no
    order. tile: rows interleaved (see `tile_centroids`), 1 for none.
    """

    bits: int
    group_size: int
    groups: int
    groups_pad: int
    words: int
    words_pad: int
    width: int
    tile: int
    chunk: int

    @classmethod
    def of(cls, centroids: QuantizedCentroids) -> CentroidShape:
        group_bytes = centroids.group_size * centroids.bits // 8
        width = 4 if group_bytes % 4 == 0 else 1
        groups, words = centroids.hidden_size // centroids.group_size, group_bytes // width
        return cls(
            bits=centroids.bits,
            group_size=centroids.group_size,
            groups=groups,
            groups_pad=power_of_two(groups),
            words=words,
            words_pad=power_of_two(words),
            width=width,
            tile=centroids.tile,
            chunk=2 if groups % 2 == 0 else 1,
        )


@dataclass(frozen=True)
class HeadShape:
    """One rank's groups as `flashhead_candidates` sees them, and the blocks that its kernel takes.

    clusters M, tokens S, probes p of a probing group; `block_probes` clusters are scored at a time.
    pinned: rows a group that are always scored. best: keys kept, k rounded up.
    """

    clusters: int
    clusters_pad: int
    tokens: int
    tokens_pad: int
    hidden_size: int
    hidden_pad: int
    probes: int
    probes_pad: int
    block_probes: int
    block_columns: int
    pinned: int
    pinned_pad: int
    best: int

    @classmethod
    def of(
        cls, clusters: int, tokens: int, hidden_size: int, probes: int, pinned: int, k: int
    ) -> HeadShape:
        probes_pad = power_of_two(probes)
        return cls(
            clusters=clusters,
            clusters_pad=power_of_two(clusters),
            tokens=tokens,
            tokens_pad=power_of_two(tokens),
            hidden_size=hidden_size,
            hidden_pad=power_of_two(hidden_size),
            probes=probes,
            probes_pad=probes_pad,
            block_probes=min(probes_pad, max(1, _ROWS_A_BLOCK // power_of_two(tokens))),
            block_columns=min(power_of_two(hidden_size), _COLUMNS_A_BLOCK),
            pinned=pinned,
            pinned_pad=power_of_two(pinned),
            best=power_of_two(k),
        )


def fits_one_launch(shape: HeadShape, centroids: CentroidShape | None, batch: int) -> bool:
    """Whether one program can hold the scores and a chunk of the centroids of a whole group."""
    if batch > MAX_BATCH_IN_ONE_LAUNCH:
        return False
    words = 32 if centroids is None else centroids.chunk * centroids.words_pad
    return shape.clusters_pad * words <= HEAD_WARPS * 32 * _WORDS_A_THREAD


def part_block(parts: int, best: int) -> int:
    """Parts that the last program reduces at a time: some 1,024 keys."""
    return min(power_of_two(parts), max(1, _KEYS_A_BLOCK // best))


def is_interpreted() -> bool:
    """Whether Triton interprets its kernels on CPU tensors; inline PTX is then unknown."""
    return os.environ.get("TRITON_INTERPRET") == "1"
