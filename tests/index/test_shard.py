"""A rank's part of a stored index: whole groups, every token once, for any number of ranks."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flashhead_dist.index import (
    HeadIndexError,
    IndexOptions,
    LoadedShard,
    TokenMap,
    build_index,
    load_shard,
)
from flashhead_dist.models import ModelSource, open_model

TP_SIZES = (1, 2, 3, 5, 8)
V, D, GROUPS = 1013, 64, 8


@pytest.fixture(scope="module")
def model(tied_model: Path) -> ModelSource:
    return open_model(str(tied_model))


@pytest.fixture(scope="module")
def weights(model: ModelSource) -> Tensor:
    return model.read_rows(0, V)


def _shards(index: Path, tp_size: int) -> list[LoadedShard]:
    return [load_shard(index, tp_rank=rank, tp_size=tp_size) for rank in range(tp_size)]


def _tensors(loaded: LoadedShard) -> dict[str, Tensor]:
    """All tensors of a shard, by name, with groups first."""
    shard = loaded.shard
    tensors = {
        field.name: getattr(shard, field.name)
        for field in dataclasses.fields(shard)
        if isinstance(getattr(shard, field.name), Tensor)
    }
    tensors["centroid_values"] = shard.centroids.values
    if shard.centroids.scales is not None:
        tensors["centroid_scales"] = shard.centroids.scales
    return tensors


@pytest.mark.parametrize("tp_size", TP_SIZES)
def test_ranks_hold_every_token_once_and_every_group_as_one_rank_would(
    tied_index: Path, tp_size: int
) -> None:
    whole = _tensors(load_shard(tied_index))
    assert set(whole) >= {"rows", "token_ids", "spread", "pinned_rows", "centroid_scales"}
    seen = []
    for rank, shard in enumerate(_shards(tied_index, tp_size)):
        groups = list(range(rank, GROUPS, tp_size))
        assert shard.shard.group_ids.tolist() == groups
        for name, tensor in _tensors(shard).items():
            assert torch.equal(tensor, whole[name][groups]), name
        seen += [shard.shard.token_ids.flatten(), shard.shard.pinned_token_ids.flatten()]
    ids = torch.cat(seen)
    assert torch.equal(ids[ids >= 0].long().sort().values, torch.arange(V))


def test_rows_are_the_models_and_pads_can_never_win(tied_index: Path, weights: Tensor) -> None:
    shard = load_shard(tied_index).shard
    for rows, ids in (
        (shard.rows, shard.token_ids),
        (shard.pinned_rows, shard.pinned_token_ids),
    ):
        assert torch.equal(rows[ids >= 0], weights[ids[ids >= 0].long()])
        assert not rows[ids < 0].any()
    only_pads = (shard.token_ids < 0).all(-1)
    assert torch.equal(shard.spread.isneginf(), only_pads)
    assert bool((shard.spread[~only_pads] >= 0).all())
    # 1010 tokens in 1024 slots, three pinned ones in eight.
    assert int((shard.token_ids < 0).sum()) == 14
    assert shard.pinned_token_ids.shape == (GROUPS, 1)
    assert int((shard.pinned_token_ids >= 0).sum()) == 3


@pytest.mark.parametrize("tp_size", TP_SIZES)
def test_no_rank_holds_more_than_its_groups(tied_index: Path, tp_size: int) -> None:
    whole = load_shard(tied_index).shard.weight_bytes
    stored = (tied_index / "index.safetensors").stat().st_size
    assert whole <= stored < whole + 4096
    shares = [shard.shard.weight_bytes for shard in _shards(tied_index, tp_size)]
    assert sum(shares) == whole
    assert max(shares) == whole // GROUPS * -(-GROUPS // tp_size)


@pytest.mark.parametrize("tp_size", TP_SIZES)
def test_a_token_is_located_in_the_rank_and_row_that_hold_it(
    tied_index: Path, weights: Tensor, tp_size: int
) -> None:
    shards = _shards(tied_index, tp_size)
    tensors = [shard.shard for shard in shards]
    held = [torch.cat([s.rows.flatten(0, 2), s.pinned_rows.flatten(0, 1)]) for s in tensors]
    ids = [torch.cat([s.token_ids.flatten(), s.pinned_token_ids.flatten()]) for s in tensors]
    for shard in shards:
        rank, row = shard.token_location(torch.arange(V))
        assert rank.dtype == row.dtype == torch.int64
        for token, (owner, place) in enumerate(zip(rank.tolist(), row.tolist(), strict=True)):
            assert int(ids[owner][place]) == token
        found = torch.stack([held[o][p] for o, p in zip(rank.tolist(), row.tolist(), strict=True)])
        assert torch.equal(found, weights)


@pytest.mark.parametrize("tp_size", TP_SIZES)
def test_lookups_of_all_ranks_add_up_to_the_input_embedding(
    tied_index: Path, weights: Tensor, tp_size: int
) -> None:
    draw = torch.Generator().manual_seed(0)
    shards = _shards(tied_index, tp_size)
    pinned = torch.cat([shard.shard.pinned_token_ids.flatten() for shard in shards])
    tokens = torch.cat([torch.randint(V, (57,), generator=draw), pinned[pinned >= 0].long()])
    tokens = tokens.reshape(4, 15)
    parts = torch.stack([shard.embedding_lookup(tokens) for shard in shards])
    assert parts.dtype == weights.dtype
    assert torch.equal(parts.sum(0), weights[tokens])
    # Each row comes from one rank: rows of zeros from all others.
    assert int(parts.any(-1).sum()) == tokens.numel()
    assert shards[0].embedding_lookup(tokens[:0]).shape == (0, 15, D)
    one = torch.stack([shard.embedding_lookup(tokens.int()[0, 0]) for shard in shards])
    assert torch.equal(one.sum(0), weights[tokens[0, 0]])


@pytest.mark.parametrize("token", [-1, V])
def test_ids_outside_the_vocabulary_are_refused(tied_index: Path, token: int) -> None:
    shard = load_shard(tied_index, tp_rank=1, tp_size=3)
    for lookup in (shard.token_location, shard.embedding_lookup):
        with pytest.raises(IndexError, match="between 0 and 1012"):
            lookup(torch.tensor([0, token]))


def test_the_map_counts_clusters_of_all_own_groups_before_pinned_slots() -> None:
    token_ids = torch.arange(10).reshape(5, 2, 1).int()
    pinned = torch.tensor([[10, 11], [12, -1], [13, -1], [14, -1], [15, -1]]).int()
    rank, row = TokenMap.of(token_ids, pinned, 16, 2).locate(torch.arange(16))
    assert rank.tolist() == [0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 0, 0, 1, 0, 1, 0]
    assert row.tolist() == [0, 1, 0, 1, 2, 3, 2, 3, 4, 5, 6, 7, 4, 8, 6, 10]


def test_an_index_without_pins_in_16_bits_is_served_alike(
    model: ModelSource, weights: Tensor, tmp_path: Path
) -> None:
    options = IndexOptions(num_groups=3, cluster_size=8, centroid_bits=16)
    out = build_index(
        model,
        options,
        calibration=None,
        test=None,
        out=tmp_path / "plain",
        device="cpu",
        progress=False,
    )
    shards = _shards(out, 2)
    assert shards[0].shard.centroids.scales is None
    assert shards[0].shard.pinned_rows.shape == (2, 0, D)
    assert shards[1].shard.pinned_token_ids.shape == (1, 0)
    found = torch.stack([shard.embedding_lookup(torch.arange(V)) for shard in shards])
    assert torch.equal(found.sum(0), weights)


def test_more_ranks_than_groups_are_refused(tied_index: Path) -> None:
    with pytest.raises(HeadIndexError, match=r"9 ranks are more than the 8 probing groups.*fewer"):
        load_shard(tied_index, tp_rank=0, tp_size=9)


def test_more_ranks_than_tokens_are_refused(tmp_path: Path) -> None:
    model = open_model(synthetic="5,64")
    out = build_index(
        model,
        IndexOptions(num_groups=8),
        calibration=None,
        test=None,
        out=tmp_path / "few",
        device="cpu",
        progress=False,
    )
    ids = torch.cat([shard.shard.token_ids.flatten() for shard in _shards(out, 5)])
    assert sorted(ids[ids >= 0].tolist()) == [0, 1, 2, 3, 4]
    with pytest.raises(HeadIndexError, match=r"vocabulary of 5 tokens is too small for 6 ranks"):
        load_shard(out, tp_rank=0, tp_size=6)


@pytest.mark.parametrize(("rank", "size"), [(3, 3), (-1, 2), (0, 0)])
def test_a_rank_that_is_none_of_them_is_a_programming_error(
    tied_index: Path, rank: int, size: int
) -> None:
    with pytest.raises(ValueError, match="is not one of"):
        load_shard(tied_index, tp_rank=rank, tp_size=size)


def test_an_index_for_other_weights_is_refused(
    tied_model: Path, tied_index: Path, tmp_path: Path
) -> None:
    """One entry of one row differs by one bit."""
    same, other = tmp_path / "same", tmp_path / "other"
    shutil.copytree(tied_model, same)
    shutil.copytree(tied_model, other)
    rows = load_file(other / "model.safetensors")["lm_head.weight"]
    rows.view(torch.int16)[1000, 63] ^= 1
    save_file({"lm_head.weight": rows}, other / "model.safetensors")
    config = json.loads((other / "config.json").read_text())
    assert config["vocab_size"] == V
    load_shard(tied_index, model=open_model(str(same)))
    with pytest.raises(HeadIndexError, match=r"other weights.*launch/build_index\.py") as refusal:
        load_shard(tied_index, model=open_model(str(other)))
    assert str(tied_index) in str(refusal.value)
