"""One copy of the weights where a model's input and output embeddings are tied."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from flashhead_dist.index import IndexShard
from flashhead_kernels.cpu_memory import empty_on_large_pages


class SharedEmbedding(nn.Module):
    """A model's own input embedding, reading the rows of an index through a map of token ids.

    The wrapped module does what it always did with a row (Gemma scales it); its weight is in the
    order of the index and therefore not to be found on this module.
    """

    def __init__(self, embedding: nn.Embedding, rows: Tensor, row_of_token: Tensor) -> None:
        """rows: `[r, D]`, not copied; row_of_token: int32 `[V]`."""
        super().__init__()
        embedding.weight = nn.Parameter(rows, requires_grad=False)
        embedding.num_embeddings = len(rows)
        # It only stops gradients, and its row is no longer where it was.
        self.padding_idx = embedding.padding_idx
        embedding.padding_idx = None
        self.embedding = embedding
        self.embedding_dim = embedding.embedding_dim
        self.num_embeddings = len(row_of_token)
        self.register_buffer("row_of_token", row_of_token, persistent=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """`[..., D]` of int64 `[...]`; IndexError for an id outside the vocabulary."""
        table: Tensor = self.row_of_token  # type: ignore[assignment]
        rows = table.index_select(0, input_ids.reshape(-1).to(table.device))
        found: Tensor = self.embedding(rows.view(input_ids.shape))
        return found

    def unwrap(self, weight: Tensor) -> nn.Embedding:
        """The wrapped module with `weight [V, D]` in token order."""
        embedding = self.embedding
        embedding.weight = nn.Parameter(weight, requires_grad=False)
        embedding.num_embeddings = len(weight)
        embedding.padding_idx = self.padding_idx
        return embedding


def gather_rows(shard: IndexShard, dtype: torch.dtype) -> tuple[IndexShard, Tensor]:
    """`shard` with its rows in `dtype` and in one block `[r, D]`, clustered rows before pinned."""
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
    return replace(shard, rows=rows, pinned_rows=pinned_rows), block
