"""kernels/bench.py, what it measures: one rank's weights, their bytes, and how copies rotate."""

from __future__ import annotations

import pytest
import torch

import bench_shapes as shapes

CPU = torch.device("cpu")
SMALL = shapes.Shape("small", 4096, 64)


def test_bytes_of_gemma_at_tp_8_by_hand() -> None:
    """V = 262,144, D = 640: 16 of 128 groups of 512 clusters of 4 tokens, 16 probes a group."""
    gemma = shapes.MODELS["gemma-3-270m"]
    assert (gemma.clusters_per_group, gemma.probes_per_group) == (512, 16)
    shard = shapes.make_shard(gemma, 8, CPU, seed=0)
    clusters = 16 * 512
    centroids = clusters * (640 // 2 + 640 // 64 * 2)  # int4, a bfloat16 scale for 64 columns
    spread = clusters * 4
    pinned = 16 * (640 * 2 + 4)
    state = 640 * 2
    a_cluster = 4 * (640 * 2 + 4)
    fixed = centroids + spread + pinned
    assert shard.flashhead_bytes(16 * 16, 1) == fixed + state + 256 * a_cluster == 4_154_688
    assert shard.flashhead_bytes(1000, 3) == fixed + 3 * state + 1000 * a_cluster
    assert shard.dense_bytes(1) == (262_144 // 8) * 640 * 2 + state
    assert shard.held_bytes == fixed + clusters * a_cluster


@pytest.mark.parametrize("tp_size", [1, 3, 8, 128])
def test_a_shard_is_rank_0s_part_of_an_index(tp_size: int) -> None:
    shape = shapes.Shape("odd", 5000, 64)
    shard = shapes.make_shard(shape, tp_size, CPU, seed=0)
    groups = list(range(0, 128, tp_size))
    assert shard.rows.shape == (len(groups), shape.clusters_per_group, 4, 64)
    # Every token but the 128 pinned ones is in one slot of all ranks' groups; here are our own.
    ids = shard.token_ids
    expected = [t for t in range(5000 - 128) if (t // 4) % 128 in groups]
    assert sorted(ids[ids >= 0].tolist()) == expected
    assert shard.pinned_token_ids.flatten().tolist() == [5000 - 128 + g for g in groups]
    assert torch.equal(torch.isneginf(shard.spread), (ids < 0).all(2))
    assert shard.dense_rows.shape == (-(-5000 // tp_size), 64)


def test_dense_rows_are_all_there_where_clusters_hold_fewer() -> None:
    """2,176 tokens, 128 of them pinned: the clusters hold 2,048 without a pad."""
    shard = shapes.make_shard(shapes.Shape("full", 2176, 64), 1, CPU, seed=0)
    assert shard.token_ids.numel() == 2048
    assert len(shard.dense_rows) == 2176


def test_centroids_are_the_means_of_their_rows() -> None:
    shard = shapes.make_shard(SMALL, 4, CPU, seed=0)
    error = (shard.centroids.dequantize() - shard.rows.float().mean(2)).abs().max()
    assert float(error) < 0.1 * float(shard.rows.float().mean(2).abs().max())


def test_a_clone_shares_no_memory() -> None:
    shard = shapes.make_shard(SMALL, 4, CPU, seed=0)
    other = shard.clone()
    for name in ("storage", "token_ids", "spread", "pinned_rows", "pinned_token_ids"):
        ours, theirs = getattr(shard, name), getattr(other, name)
        assert torch.equal(ours, theirs)
        assert ours.data_ptr() != theirs.data_ptr()
    assert shard.centroids.values.data_ptr() != other.centroids.values.data_ptr()
    assert shard.centroids.scales is not None
    assert other.centroids.scales is not None
    assert shard.centroids.scales.data_ptr() != other.centroids.scales.data_ptr()


def test_distinct_clusters_are_counted_once_a_batch() -> None:
    shard = shapes.make_shard(shapes.Shape("wide", 32_768, 64), 8, CPU, seed=0)
    state = torch.randn(1, 1, 64, dtype=torch.bfloat16)
    alone = 16 * shard.probes_per_group
    assert shard.probes_per_group == 2
    assert shard.count_clusters_read(state) == alone
    assert shard.count_clusters_read(state.expand(2, 3, -1)) == alone
    opposed = torch.cat([state, -state], dim=1)  # [1, 2, D]: what one probes, the other does not
    shard.spread.zero_()
    assert shard.count_clusters_read(opposed) == 2 * alone


def test_copies_go_through_twice_the_cache_between_two_uses_of_one() -> None:
    for read, cache in [(4e6, 60_000_000), (120e6, 60_000_000), (121e6, 60_000_000), (3.0, 0)]:
        copies = shapes.rotation_count(read, cache)
        assert copies >= 2
        assert (copies - 1) * read > 2 * cache
        assert copies == 2 or (copies - 2) * read <= 2 * cache
    assert shapes.rotation_count(4e6, 60_000_000) == 32
