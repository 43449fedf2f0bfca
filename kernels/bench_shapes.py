"""One rank's weights for `bench.py`: made-up values in the layout and numbers of a real index.

A shard holds what rank 0 of `tp_size` ranks reads. Time does not depend on the values of the
weights: every probing group probes a fixed share of its clusters. Above batch 1 it depends on how
many probes the rows of a batch share; independent random states share few, as text hardly does.

Letters: N groups of M clusters of S tokens, V vocabulary, D hidden size, B rows, P `tp_size`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from flashhead_kernels import reference
from flashhead_kernels.quantize import (
    TILE,
    Projection,
    QuantizedCentroids,
    quantize_centroids,
    tile_centroids,
)
from flashhead_kernels.shard import IndexShard, Query

GROUPS = 128
CLUSTER_SIZE = 4
CENTROID_BITS = 4
SCALE_GROUP = 64
PROBED_SHARE = 32
"""One row in this many is a candidate: the default of an index."""
ALPHA = 1.0
SMALLEST_VOCABULARY = 2048


@dataclass(frozen=True)
class Shape:
    """An output embedding `[V, D]` by name."""

    name: str
    vocab_size: int
    hidden_size: int

    @property
    def clusters_per_group(self) -> int:
        """M: each group also pins one token, which no cluster holds."""
        return -(-(self.vocab_size - GROUPS) // (CLUSTER_SIZE * GROUPS))

    @property
    def probes_per_group(self) -> int:
        """Clusters that a group probes for a row, rounded up."""
        return -(-self.clusters_per_group // PROBED_SHARE)


MODELS = {
    shape.name: shape
    for shape in (
        Shape("gemma-3-270m", 262_144, 640),
        Shape("llama-3.2-1b", 128_256, 2_048),
        Shape("qwen3-1.7b", 151_936, 2_048),
        Shape("llama-3.1-8b", 128_256, 4_096),
    )
}


@dataclass(frozen=True)
class Shard:
    """Rank 0's part. See `IndexShard` for the tensors' shapes.

    storage: `[n, D]`, the memory of both `rows` and `dense_rows`.
    num_dense_rows: V / P rounded up: what a dense head's rank scores.
    """

    storage: Tensor
    token_ids: Tensor
    centroids: QuantizedCentroids
    spread: Tensor
    pinned_rows: Tensor
    pinned_token_ids: Tensor
    probes_per_group: int
    num_dense_rows: int

    @property
    def rows(self) -> Tensor:
        """`[N, M, S, D]`."""
        return self.storage[: self.token_ids.numel()].view(*self.token_ids.shape, -1)

    @cached_property
    def index(self) -> IndexShard:
        """As the kernels take it."""
        return IndexShard(
            self.rows, self.token_ids, self.centroids, self.spread, self.pinned_rows,
            self.pinned_token_ids, torch.arange(len(self.spread), device=self.spread.device),
        )  # fmt: skip

    def query(self, **options: Any) -> Query:
        """The step that an index of this size takes by default."""
        return Query(self.probes_per_group, ALPHA, **options)

    @property
    def dense_rows(self) -> Tensor:
        """`[num_dense_rows, D]`; row r stands for token r."""
        return self.storage[: self.num_dense_rows]

    @property
    def hidden_size(self) -> int:
        """D."""
        return self.storage.shape[1]

    @property
    def held_bytes(self) -> int:
        """Bytes of all tensors."""
        tensors = (self.storage, self.token_ids, self.spread)
        pinned = self.pinned_rows.nbytes + self.pinned_token_ids.nbytes
        return self.centroids.nbytes + pinned + sum(tensor.nbytes for tensor in tensors)

    def clone(self) -> Shard:
        """The same values in other memory."""
        scales = self.centroids.scales
        return replace(
            self,
            storage=self.storage.clone(),
            token_ids=self.token_ids.clone(),
            centroids=replace(
                self.centroids,
                values=self.centroids.values.clone(),
                scales=None if scales is None else scales.clone(),
            ),
            spread=self.spread.clone(),
            pinned_rows=self.pinned_rows.clone(),
            pinned_token_ids=self.pinned_token_ids.clone(),
        )

    def flashhead_bytes(self, num_clusters_read: float, batch_size: int) -> float:
        """Bytes that a step must read, each once.

        Centroids with scales and spread; rows and ids of `num_clusters_read` clusters, the distinct
        ones that the batch probes; pinned rows and ids; hidden states.
        """
        num_clusters = self.spread.numel()
        per_cluster = (self.rows.nbytes + self.token_ids.nbytes) // num_clusters
        pinned = self.pinned_rows.nbytes + self.pinned_token_ids.nbytes
        fixed = self.centroids.nbytes + self.spread.nbytes + pinned + self._state_bytes(batch_size)
        return fixed + num_clusters_read * per_cluster

    def dense_bytes(self, batch_size: int) -> float:
        """Bytes that a dense step must read, each once: rows and hidden states."""
        return float(self.dense_rows.nbytes + self._state_bytes(batch_size))

    def row_of(self, token_id: int) -> Tensor | None:
        """The row `[D]` of a token that this rank holds; None for any other and for a pad."""
        if token_id < 0:
            return None
        for rows, ids in (
            (self.rows, self.token_ids),
            (self.pinned_rows, self.pinned_token_ids),
        ):
            places = (ids.flatten() == token_id).nonzero()
            if len(places):
                return rows.reshape(-1, self.hidden_size)[int(places[0])]
        return None

    def dense_row_of(self, token_id: int) -> Tensor | None:
        """The row `[D]` of a token of a dense head's rank; None for any other."""
        return self.dense_rows[token_id] if 0 <= token_id < self.num_dense_rows else None

    def count_clusters_read(self, states: Tensor) -> float:
        """Distinct clusters that a batch probes, the mean over batches `states [K, B, D]`."""
        scores = reference.score_centroids(states.flatten(0, 1), self.index, ALPHA)
        probes = reference.select_probes(scores, self.probes_per_group)  # [K * B, N, p]
        batches = probes.view(*states.shape[:2], *probes.shape[1:]).transpose(1, 2).flatten(2)
        # batches [K, N, B * p]
        read = torch.zeros(*batches.shape[:2], self.spread.shape[1], device=states.device)
        read.scatter_(2, batches.long(), 1)
        return float(read.sum()) / len(states)

    def _state_bytes(self, batch_size: int) -> int:
        return batch_size * self.storage[0].nbytes


def make_shard(shape: Shape, tp_size: int, device: torch.device, seed: int) -> Shard:
    """Random weights of rank 0: groups 0, P, 2P ... of the 128, and V / P rows for a dense head."""
    generator = torch.Generator(device).manual_seed(seed)
    group_ids = torch.arange(0, GROUPS, tp_size, dtype=torch.int32, device=device)
    clusters, size = shape.clusters_per_group, shape.hidden_size
    slots = torch.arange(clusters, dtype=torch.int32, device=device)
    places = torch.arange(CLUSTER_SIZE, dtype=torch.int32, device=device)
    tree = slots * GROUPS + group_ids[:, None]  # cluster t is slot t // 128 of group t % 128
    token_ids = tree[:, :, None] * CLUSTER_SIZE + places
    clustered = shape.vocab_size - GROUPS
    token_ids = token_ids.masked_fill(token_ids >= clustered, -1)

    def draw(*dimensions: int) -> Tensor:
        values = torch.randn(dimensions, generator=generator, device=device, dtype=torch.bfloat16)
        return values.mul_(size**-0.5)

    num_dense_rows = -(-shape.vocab_size // tp_size)
    storage = draw(max(token_ids.numel(), num_dense_rows), size)
    clustered_rows = storage[: token_ids.numel()].view(-1, CLUSTER_SIZE, size)
    means = clustered_rows.mean(1, dtype=torch.float32).view(len(group_ids), clusters, size)
    spread = torch.rand(len(group_ids), clusters, generator=generator, device=device)
    return Shard(
        storage=storage,
        token_ids=token_ids,
        centroids=tile_centroids(
            quantize_centroids(means, CENTROID_BITS, SCALE_GROUP), pad=device.type == "cuda"
        ),
        spread=(spread / size**0.5).masked_fill((token_ids < 0).all(2), float("-inf")),
        pinned_rows=draw(len(group_ids), 1, size),
        pinned_token_ids=(clustered + group_ids)[:, None],
        probes_per_group=shape.probes_per_group,
        num_dense_rows=num_dense_rows,
    )


def empty_shard(
    shape: Shape, tp_size: int, device: torch.device, share_of_columns: float = 1.0
) -> Shard:
    """Rank 0's tensors without values: on a CPU, memory that is not touched is not taken.

    share_of_columns: of D, in which centroids are kept behind a projection; 1 for all, without one.
    """
    groups, clusters = -(-GROUPS // tp_size), shape.clusters_per_group
    size, rows = shape.hidden_size, -(-shape.vocab_size // tp_size)
    columns = round(size * share_of_columns) // SCALE_GROUP * SCALE_GROUP

    def empty(*dimensions: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(dimensions, dtype=dtype, device=device)

    token_ids = empty(groups, clusters, CLUSTER_SIZE, dtype=torch.int32)
    projection = Projection(
        empty(columns, size, dtype=torch.float32), empty(size, dtype=torch.float32)
    )
    stored = -(-clusters // TILE) * TILE
    centroids = QuantizedCentroids(
        values=empty(groups, stored, columns * CENTROID_BITS // 8, dtype=torch.uint8),
        scales=empty(groups, stored, columns // SCALE_GROUP),
        bits=CENTROID_BITS,
        group_size=SCALE_GROUP,
        hidden_size=columns,
        tile=TILE,
        projection=None if columns == size else projection,
        padding=stored - clusters,
    )
    return Shard(
        storage=empty(max(token_ids.numel(), rows), size),
        token_ids=token_ids,
        centroids=centroids,
        spread=empty(groups, clusters, dtype=torch.float32),
        pinned_rows=empty(groups, 1, size),
        pinned_token_ids=empty(groups, 1, dtype=torch.int32),
        probes_per_group=shape.probes_per_group,
        num_dense_rows=rows,
    )


def rotation_count(read_bytes: float, cache_bytes: int) -> int:
    """Copies of the weights, two or more, that steps take in turn.

    Between two uses of one copy, steps that read `read_bytes` each go through more than twice the
    cache.
    """
    return 2 + int(2 * cache_bytes // read_bytes)
