"""Made-up shards of an index for kernel tests: pads, ties on demand, awkward sizes."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from flashhead_kernels.keys import unpack_keys
from flashhead_kernels.quantize import quantize_centroids, tile_centroids
from flashhead_kernels.shard import Candidates, IndexShard, Query

ALPHA = 0.05


def candidates(
    ops: ModuleType,
    shard: IndexShard,
    states: Tensor,
    probes: int,
    *,
    k: int = 1,
    need_logsumexp: bool = False,
    need_unprobed: bool = False,
    **options: Any,
) -> Candidates:
    """A step of `ops` with the tests' alpha."""
    query = Query(probes, ALPHA, k, need_logsumexp, need_unprobed)
    found: Candidates = ops.candidates(states, shard, query, **options)
    return found


def agree(found: Candidates, expected: Candidates) -> None:
    """The same tokens; logits, log-sum-exp and score within float32 sums in another order."""
    logits, ids = unpack_keys(found.keys)
    wanted, wanted_ids = unpack_keys(expected.keys)
    torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-4)
    assert torch.equal(ids, wanted_ids)
    if found.token_ids is not None:
        assert torch.equal(found.token_ids, ids)
        assert torch.equal(found.logits, logits)
    if expected.logsumexp is not None:
        torch.testing.assert_close(found.logsumexp, expected.logsumexp, rtol=1e-5, atol=1e-4)
    if expected.unprobed is not None:
        assert found.unprobed is not None
        scores, wanted = (unpack_keys(one.unprobed)[0] for one in (found, expected))
        torch.testing.assert_close(scores, wanted, rtol=1e-5, atol=1e-4)


def every_logit(shard: IndexShard, states: Tensor) -> tuple[Tensor, Tensor]:
    """Logits float64 `[B, V]` and their token ids `[V]`."""
    rows = torch.cat([shard.rows.flatten(0, 2), shard.pinned_rows.flatten(0, 1)]).double()
    ids = torch.cat([shard.token_ids.flatten(), shard.pinned_token_ids.flatten()])
    real = ids >= 0
    return states.double() @ rows[real].T, ids[real]


def select_groups(shard: IndexShard, groups: list[int]) -> IndexShard:
    """A copy of some of the groups, by their place in `shard`."""
    tensors = {name: value for name, value in vars(shard).items() if isinstance(value, Tensor)}
    scales = shard.centroids.scales
    centroids = replace(
        shard.centroids,
        values=shard.centroids.values[groups],
        scales=None if scales is None else scales[groups],
    )
    return IndexShard(
        centroids=centroids,
        **{name: tensors[name][groups] for name in tensors if name in IndexShard.__annotations__},
    )


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
) -> IndexShard:
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
    group_ids = torch.arange(groups) * 3 + 1
    return IndexShard(rows, token_ids, centroids, spread, pinned_rows, pinned_ids, group_ids)


def random_states(batch: int, size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Hidden states `[batch, size]`."""
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, size, generator=generator).to(dtype)
