"""Shapes that the kernels are compiled for, how a step is laid out over a GPU, and its device.

Besides the counters nothing outlives a launch: what it leaves its parts in comes from torch's
allocator, is counted there, and belongs to the pool of the graph that a launch is captured in. A
launch serves at most `MAX_ROWS` rows, which bounds it (`docs/concepts/kernels.md` has figures).

Letters: `N` probing groups of `M` clusters of `S` tokens, of which `p` are probed; `D` hidden size,
`B` rows.
"""

from __future__ import annotations

import functools
import os
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from flashhead_kernels.quantize import QuantizedCentroids
from flashhead_kernels.shard import IndexShard, Query

MAX_ROWS = 64
"""Rows of one launch; larger batches take several."""
MAX_BEST = 64
"""Keys that a kernel keeps for each row."""
ROWS_A_PROGRAM = 8
"""Rows that share one pass over the centroids."""
MAX_ROWS_QUANTIZED_IN_PLACE = 4
"""Up to this many rows every program quantises them itself: cheaper than a launch of its own."""
ONE_LAUNCH_WARPS = 16
CANDIDATES_WARPS = 4
ONE_LAUNCH_REGISTERS = 128
CANDIDATES_REGISTERS = 168
"""Most that a thread may have. Left to itself the compiler spills a few, for a second program."""
ROWS_A_WARP = 2
"""Rows of the output embedding that a warp scores at a time. The same in every kernel: the layout
of a block, and so the order of its float sums, follows from it."""
MAX_CLUSTERS_IN_ONE_LAUNCH = 4096
_COLUMNS_A_BLOCK = 128
_MAX_SEGMENTS = 8
_LEAST_SEGMENT = 4
_WORDS_LOADED = 40
"""Words of a centroid that a thread loads before it uses any: what hides the memory's latency."""
_CLUSTERS_A_BLOCK = (128, 64, 32)
_PROGRAMS_A_PROCESSOR = 2
_KEYS_A_BLOCK = 1024
_MAX_PARTS_A_BLOCK = 128


def power_of_two(size: int) -> int:
    """The power of two at or above `size`, 1 at least."""
    return 1 << max(0, size - 1).bit_length()


@dataclass(frozen=True)
class CentroidShape:
    """How a rank's integer centroids lie in memory, for a kernel; `words` of `width` bytes.

    groups: scale groups of a row, `group_size` columns and `words` words each; words_pad: the power
    of two at or above. segment: scale groups whose products are summed before they are added to
    those of other segments; a program may score one segment. chunk: scale groups of a segment whose
    words are loaded before any is used; 0 where words do not come in fours. tile: rows interleaved
    (see `tile_centroids`), 1 for none.
    """

    bits: int
    group_size: int
    groups: int
    words: int
    words_pad: int
    width: int
    tile: int
    segment: int
    chunk: int

    @classmethod
    def of(cls, centroids: QuantizedCentroids) -> CentroidShape:
        return _centroid_shape(
            centroids.bits, centroids.group_size, centroids.hidden_size, centroids.tile
        )

    @property
    def segments(self) -> int:
        return -(-self.groups // self.segment)


@functools.cache
def _centroid_shape(bits: int, group_size: int, size: int, tile: int) -> CentroidShape:
    group_bytes = group_size * bits // 8
    width = 4 if group_bytes % 4 == 0 else 1
    groups, words = size // group_size, group_bytes // width
    segment = -(-groups // max(1, min(_MAX_SEGMENTS, groups // _LEAST_SEGMENT)))
    fours = width == 4 and words % 4 == 0
    most = _WORDS_LOADED // words
    chunks = [count for count in range(1, most + 1) if segment % count == 0]
    return CentroidShape(
        bits=bits,
        group_size=group_size,
        groups=groups,
        words=words,
        words_pad=power_of_two(words),
        width=width,
        tile=tile,
        segment=segment,
        chunk=max(chunks, default=0) if fours else 0,
    )


@dataclass(frozen=True)
class HeadShape:
    """A query to one rank's groups.

    clusters M, tokens S, probes p of a probing group; pinned: rows a group that are always scored.
    best: keys kept, k rounded up. block_columns: columns of a row that are loaded at a time.
    """

    clusters: int
    clusters_pad: int
    tokens: int
    tokens_pad: int
    hidden_size: int
    probes: int
    probes_pad: int
    block_columns: int
    pinned: int
    best: int

    @classmethod
    def of(cls, shard: IndexShard, query: Query) -> HeadShape:
        _, clusters, tokens, size = shard.rows.shape
        probes, pinned = query.num_probes_per_group, shard.pinned_rows.shape[1]
        return _head_shape(clusters, tokens, size, probes, pinned, query.k)

    @classmethod
    def of_centroids(cls, clusters: int, hidden_size: int) -> HeadShape:
        """Where no rows are scored."""
        return _head_shape(clusters, 1, hidden_size, 1, 0, 1)


@functools.cache  # a step makes it anew
def _head_shape(
    clusters: int, tokens: int, hidden_size: int, probes: int, pinned: int, k: int
) -> HeadShape:
    return HeadShape(
        clusters=clusters,
        clusters_pad=power_of_two(clusters),
        tokens=tokens,
        tokens_pad=power_of_two(tokens),
        hidden_size=hidden_size,
        probes=probes,
        probes_pad=power_of_two(probes),
        block_columns=min(power_of_two(hidden_size), _COLUMNS_A_BLOCK),
        pinned=pinned,
        best=power_of_two(k),
    )


@dataclass(frozen=True)
class HeadPlan:
    """How a step of B rows over N groups is laid out.

    prepares: hidden states are projected or quantised by a launch of their own, once for all
        programs; otherwise every program quantises the rows that it scores.
    fits_one_launch: one program can hold the scores of a whole group.
    may_take_two: centroids and candidates in launches of their own may serve the step: for few
        rows, which need no launch before them, and where one launch cannot.
    rows_a_program: rows (a power of two) that a program of the one-launch kernel serves.
    dots_rows, block_clusters, segments: rows, clusters and segments of a program that scores
        centroids for a second launch; each takes one of `segments` segments.
    splits: programs that share the candidates of one group and row.
    """

    prepares: bool
    fits_one_launch: bool
    may_take_two: bool
    rows_a_program: int
    dots_rows: int
    block_clusters: int
    segments: int
    splits: int


@functools.cache
def plan_head(
    head: HeadShape, centroids: CentroidShape | None, groups: int, batch: int, processors: int,
    *, projected: bool = False,
) -> HeadPlan:  # fmt: skip
    """Lay out a step of `batch` rows over `groups` groups on a GPU of `processors` SMs.

    A program of the one-launch kernel reads a whole group's centroids, so it serves as many rows as
    leave half of the SMs a program. Where centroids are scored by a launch of their own, blocks
    shrink until every SM has one, and candidates are split until every SM has two programs.
    """
    rows = min(power_of_two(batch), ROWS_A_PROGRAM)
    while rows > 1 and groups * -(-batch // rows) < processors // 2:
        rows //= 2
    dots_rows = min(power_of_two(batch), ROWS_A_PROGRAM)
    segments = centroids.segments if centroids is not None else 1
    # Not of the batch, so that a kernel is compiled for one block.
    shares = groups * segments
    blocks = [b for b in _CLUSTERS_A_BLOCK if shares * -(-head.clusters // b) >= processors]
    few_rows = batch <= MAX_ROWS_QUANTIZED_IN_PLACE
    fits = head.clusters_pad <= MAX_CLUSTERS_IN_ONE_LAUNCH
    return HeadPlan(
        prepares=centroids is not None and (projected or not few_rows),
        fits_one_launch=fits,
        may_take_two=few_rows or not fits,
        rows_a_program=rows,
        dots_rows=dots_rows,
        block_clusters=blocks[0] if blocks else _CLUSTERS_A_BLOCK[-1],
        segments=segments,
        splits=max(1, min(head.probes, _PROGRAMS_A_PROCESSOR * processors // (groups * batch))),
    )


def part_block(best: int) -> int:
    """Parts that the last program reduces at a time: 1,024 keys at most."""
    return min(_MAX_PARTS_A_BLOCK, max(1, _KEYS_A_BLOCK // best))


def is_interpreted() -> bool:
    """Whether Triton interprets its kernels on CPU tensors; inline PTX is then unknown."""
    return os.environ.get("TRITON_INTERPRET") == "1"


_INTERPRETED_PROCESSORS = 4
"""SMs of the GPU that the interpreter stands in for; few, so that small shapes fill it."""
_HALF = 1 << 63
_counters: dict[tuple[torch.device, int], Tensor] = {}


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's device current: Triton launches on the current one."""
    return torch.cuda.device_of(tensor)  # type: ignore[no-untyped-call]


@functools.cache
def num_processors(device: torch.device) -> int:
    """SMs of a CUDA device."""
    if device.type != "cuda":
        return _INTERPRETED_PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def counters(device: torch.device) -> Tensor:
    """int32 `[MAX_ROWS]` for the current stream of `device`: 0 before and after each launch.

    Raises:
        RuntimeError: the stream is captured and has none yet.
    """
    on_cuda = device.type == "cuda"
    stream = torch.cuda.current_stream(device).cuda_stream if on_cuda else 0
    found = _counters.get((device, stream))
    if found is None:
        if on_cuda and torch.cuda.is_current_stream_capturing():
            # The zeros would be set by this graph alone, whose pool would own the memory.
            raise RuntimeError("run the head once on this stream before capturing it in a graph")
        found = torch.zeros(MAX_ROWS, dtype=torch.int32, device=device)
        _counters[device, stream] = found
    return found


def signed_seed(seed: int) -> int:
    """The same 64 bits as a signed number: a kernel's argument has one type."""
    return (seed + _HALF) % (2 * _HALF) - _HALF
