"""The bias of a linear output head, in the layout of an index and back."""

from __future__ import annotations

import torch
from torch import Tensor

from flashhead_dist.index import IndexShard
from flashhead_kernels.logits import OutputBias


def bias_of_index(bias: Tensor, shard: IndexShard) -> OutputBias:
    """`bias [V]`, as the tokens of `shard` have it."""
    real = shard.token_ids >= 0
    values = bias.float()
    rows = values[shard.token_ids.clamp(min=0).long()] * real
    clusters = rows.sum(-1) / real.sum(-1).clamp(min=1)
    return OutputBias(rows, clusters, values[shard.pinned_token_ids.clamp(min=0).long()])


def bias_of_tokens(bias: OutputBias, shard: IndexShard) -> Tensor:
    """The inverse: float32 `[V]`."""
    ids = torch.cat([shard.token_ids.flatten(), shard.pinned_token_ids.flatten()]).long()
    values = torch.cat([bias.rows.flatten(), bias.pinned.flatten()])
    tokens = values.new_zeros(shard.manifest.vocab_size)
    tokens[ids[ids >= 0]] = values[ids >= 0]
    return tokens
