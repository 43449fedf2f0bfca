"""Centroids of fewer columns: every operation against its twin and a float64 truth.

Mutated to see each fail: the mean's part left out (of the twin, of the kernels), added twice, or
added to the score but not to the mean of an unprobed cluster; D taken for the centroids' columns.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flashhead_kernels import cpu, reference
from flashhead_kernels.dispatch import ops_for, sampling_ops_for
from flashhead_kernels.quantize import (
    Projection,
    quantize_centroids,
    tile_centroids,
)
from flashhead_kernels.shard import IndexShard, Query
from tests.kernels.shards import ALPHA, agree, candidates, make_shard, random_states

BOTH = pytest.mark.parametrize("ops", [cpu, reference], ids=["cpu", "reference"])
EVERYTHING: Any = {"k": 2, "need_logsumexp": True, "need_unprobed": True}
# (groups, clusters, tokens, hidden size, bits, scale group, pinned, rows' dtype), columns kept
SHAPES = [
    ((3, 7, 4, 64, 4, 32, 1, torch.bfloat16), 32),
    ((2, 32, 4, 640, 4, 64, 0, torch.bfloat16), 384),  # in tiles
    ((2, 16, 3, 200, 8, 20, 2, torch.float32), 60),
]


def projected_shard(shape: Any, columns: int) -> IndexShard:
    """Clusters around few directions, which an orthogonal projection of `columns` axes keeps."""
    shard = make_shard(*shape)
    size, bits, group_size = shape[3], shape[4], shape[5]
    draw = torch.Generator().manual_seed(7)
    axes = torch.linalg.qr(torch.randn(size, columns, generator=draw))[0]
    offset = torch.randn(size, generator=draw)
    centroids = torch.randn(*shape[:2], columns, generator=draw) @ axes.T
    stored = tile_centroids(quantize_centroids(centroids @ axes, bits, group_size))
    projection = Projection(axes.T.contiguous(), offset)
    return replace(shard, centroids=replace(stored, projection=projection))


def dots(shard: IndexShard, states: Tensor) -> Tensor:
    """float64 `[B, N, M]`: products with the stored centroids, brought back to D columns."""
    projection = shard.centroids.projection
    assert projection is not None
    whole = shard.centroids.dequantize().double() @ projection.to_state.double()
    return torch.einsum("bd,nmd->bnm", states.double(), whole + projection.mean.double())


@BOTH
@pytest.mark.parametrize(("shape", "columns"), SHAPES)
@pytest.mark.parametrize("batch", [0, 1, 5])
def test_scores_are_those_of_whole_centroids(
    ops: Any, shape: Any, columns: int, batch: int
) -> None:
    """But for the rounding of states to int8, a part in 254 of the greatest in a scale group."""
    shard = projected_shard(shape, columns)
    states = random_states(batch, shape[3])
    without_spread = replace(shard, spread=torch.zeros_like(shard.spread))
    found = ops.score_centroids(states, without_spread, 0.0)
    assert found.shape == (batch, *shape[:2])
    truth = dots(shard, states)
    scale = truth.abs().amax() if batch else 1
    torch.testing.assert_close(found.double() / scale, truth / scale, rtol=0, atol=0.01)
    spread = ops.score_centroids(states, shard, ALPHA)
    lift = ALPHA * states.float().norm(dim=1)[:, None, None] * shard.spread
    torch.testing.assert_close(spread, found + lift, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("shape", "columns"), SHAPES)
def test_cpu_agrees_with_reference(shape: Any, columns: int) -> None:
    shard = projected_shard(shape, columns)
    states = random_states(3, shape[3])
    theirs = candidates(reference, shard, states, 3, **EVERYTHING)
    for options in ({}, {"between": lambda: None}):
        agree(candidates(cpu, shard, states, 3, **EVERYTHING, **options), theirs)


@pytest.mark.parametrize(("shape", "columns"), SHAPES)
def test_means_of_unprobed_clusters_hold_the_mean_of_all(shape: Any, columns: int) -> None:
    shard = projected_shard(shape, columns)
    states = random_states(3, shape[3])
    query = Query(3, ALPHA)
    ours = sampling_ops_for("cpu").local_scores(states, shard, query)
    theirs = sampling_ops_for("meta").local_scores(states, shard, query)
    assert torch.equal(ours.token_ids, theirs.token_ids)
    torch.testing.assert_close(ours.means, theirs.means, rtol=1e-5, atol=1e-4)
    shut = ours.means > -torch.inf
    truth = dots(shard, states)[shut]
    scale = truth.abs().amax()
    torch.testing.assert_close(ours.means[shut].double() / scale, truth / scale, rtol=0, atol=0.01)


def test_a_row_is_projected_to_the_same_bits_in_any_batch() -> None:
    """A matrix product would add in another order for other numbers of rows."""
    shape, columns = SHAPES[1]
    shard = projected_shard(shape, columns)
    states = random_states(9, 640)
    for ops in (cpu, reference):
        together = ops.score_centroids(states, shard, ALPHA)
        for first, last in ((0, 1), (4, 9)):
            part = ops.score_centroids(states[first:last], shard, ALPHA)
            if ops is cpu:
                assert torch.equal(part, together[first:last])
            torch.testing.assert_close(part, together[first:last], rtol=1e-5, atol=1e-4)


def test_bytes_hold_the_projection() -> None:
    shape, columns = SHAPES[1]
    shard = projected_shard(shape, columns)
    scales = shard.centroids.scales
    assert scales is not None
    expected = 64 * (384 // 2 + 2 * 6) + 4 * 385 * 640
    assert shard.centroids.nbytes == expected
    moved = shard.centroids.to("cpu").projection
    assert moved is not None
    assert moved.nbytes == 4 * 385 * 640


@pytest.mark.parametrize("launches", [1, 2])
@pytest.mark.parametrize(("place", "batch"), [(0, 3), (1, 1), (2, 2)])
def test_triton_agrees_with_reference(place: int, batch: int, launches: int) -> None:
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape, columns = SHAPES[place]
    shard = projected_shard(shape, columns).to(device)
    states = random_states(batch, shape[3]).to(device)
    found = [
        candidates(ops_for("cuda"), shard, states, 3, launches=number, **EVERYTHING)
        for number in (launches, 3 - launches)
    ]
    agree(found[0], candidates(reference, shard, states, 3, **EVERYTHING))
    assert torch.equal(found[0].keys, found[1].keys), "one launch and two score alike"
    assert torch.equal(found[0].unprobed, found[1].unprobed)
