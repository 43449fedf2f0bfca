"""Made-up shards of an index for kernel tests: pads, ties on demand, awkward sizes."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from flashhead_kernels.candidates import Candidates
from flashhead_kernels.quantize import QuantizedCentroids, quantize_centroids, tile_centroids

ALPHA = 0.05


@dataclass
class Shard:
    """Arguments of `flashhead_candidates` but for hidden states and probes."""

    rows: Tensor
    token_ids: Tensor
    centroids: QuantizedCentroids
    spread: Tensor
    pinned_rows: Tensor
    pinned_ids: Tensor

    def candidates(
        self, ops: ModuleType, states: Tensor, probes: int, **options: Any
    ) -> Candidates:
        found: Candidates = ops.flashhead_candidates(
            states, self.rows, self.token_ids, self.centroids, self.spread, ALPHA, probes,
            self.pinned_rows, self.pinned_ids, **options,
        )  # fmt: skip
        return found

    def every_logit(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Logits float64 `[B, V]` and their token ids `[V]`."""
        rows = torch.cat([self.rows.flatten(0, 2), self.pinned_rows.flatten(0, 1)]).double()
        ids = torch.cat([self.token_ids.flatten(), self.pinned_ids.flatten()])
        real = ids >= 0
        return states.double() @ rows[real].T, ids[real]


def make_shard(
    groups: int,
    clusters: int,
    tokens: int,
    size: int,
    bits: int,
    group_size: int,
    pinned: int,
    dtype: torch.dtype,
    *,
    seed: int = 0,
) -> Shard:
    """Random rows; the first token and the last cluster are pads, whose rows are huge."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(groups, clusters, tokens, size, generator=generator).to(dtype)
    count = groups * clusters * tokens
    token_ids = torch.randperm(count, generator=generator).view(groups, clusters, tokens).int()
    mean = rows.float().mean(2)
    spread = (rows.float() - mean.unsqueeze(2)).square().sum(-1).mean(-1).sqrt()
    if count > 1:
        token_ids[0, 0, 0] = -1
        token_ids[-1, -1] = -1
        rows[-1, -1] = 100
        spread[-1, -1] = -torch.inf
    pinned_rows = torch.randn(groups, pinned, size, generator=generator).to(dtype)
    pinned_ids = torch.arange(groups * pinned).view(groups, pinned).int() + count
    centroids = tile_centroids(quantize_centroids(mean, bits, group_size))
    return Shard(rows, token_ids, centroids, spread, pinned_rows, pinned_ids)


def random_states(batch: int, size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Hidden states `[batch, size]`."""
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, size, generator=generator).to(dtype)
