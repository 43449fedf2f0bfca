"""Building an index: deterministic, and shaped by calibration states alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import flashhead_dist
from flashhead_dist.index import (
    build,
    load_manifest,
    load_shard,
)
from flashhead_dist.index.layout import describe_clusters
from flashhead_dist.models import ModelSource, open_model
from flashhead_dist.states import HiddenStates
from flashhead_kernels.quantize import quantize_centroids

V, D = 1013, 64
Build = Callable[..., Path]


@pytest.fixture(scope="module")
def model(tied_model: Path) -> ModelSource:
    return open_model(str(tied_model))


def _data(index: Path) -> bytes:
    return (index / "index.safetensors").read_bytes()


def _pinned(index: Path) -> list[int]:
    ids = load_shard(index).shard.pinned_token_ids
    return sorted(ids[ids >= 0].tolist())


@pytest.mark.parametrize("method", ["bisect", "faiss"])
def test_the_same_bytes_come_out_whatever_the_threads_and_the_global_seed(
    build_one: Build, method: str
) -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        torch.manual_seed(1)
        one = build_one("one", method=method)
        torch.set_num_threads(2)
        torch.manual_seed(2)
        two = build_one("two", method=method)
    finally:
        torch.set_num_threads(threads)
    assert _data(one) == _data(two)
    assert load_manifest(one).index_hash == load_manifest(two).index_hash
    other = build_one("other", method=method, seed=1)
    assert load_manifest(other).index_hash != load_manifest(one).index_hash


def test_an_index_is_built_where_the_project_is_not_installed(
    build_one: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    def installed(name: str) -> str:
        if name == "flashhead-dist":
            raise PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(build, "version", installed)
    versions = load_manifest(build_one()).versions
    assert versions["flashhead-dist"] == flashhead_dist.__version__
    assert versions["torch"] == "1.0"


def test_the_manifest_says_what_was_built_and_from_what(
    build_one: Build, model: ModelSource, index_states: tuple[HiddenStates, HiddenStates]
) -> None:
    manifest = load_manifest(build_one(seed=3, alpha=0.02))
    assert (manifest.vocab_size, manifest.hidden_size) == (V, D)
    assert (manifest.model_name, manifest.weight_hash) == (model.name, model.weight_hash)
    assert (manifest.dtype, manifest.synthetic) == ("bfloat16", False)
    assert (manifest.num_clusters, manifest.cluster_size, manifest.num_groups) == (256, 4, 8)
    assert (manifest.bits, manifest.group_size, manifest.centroid_kind) == (4, 64, "mean")
    assert (manifest.method, manifest.seed, manifest.num_probes) == ("bisect", 3, 16)
    assert manifest.alpha == 0.02
    assert manifest.rounds > 0
    assert 0.5 < manifest.cohesion < 1
    assert set(manifest.versions) >= {"python", "torch", "numpy", "safetensors", "flashhead-dist"}
    calibration, test = index_states
    assert manifest.calibration["num_states"] == 300
    assert manifest.calibration["origin"] == calibration.origin
    assert [entry["alpha"] for entry in manifest.calibration["top1_agreement_by_alpha"]] == [0.02]
    fidelity = manifest.fidelity
    assert fidelity["num_states"] == 300
    assert fidelity["origin"] == test.origin
    by_source = fidelity["top1_agreement_by_source"]
    assert set(by_source) == {"text", "code"}
    assert fidelity["top1_agreement_worst_source"] == min(by_source.values())
    assert by_source[fidelity["worst_source"]] == min(by_source.values())
    assert fidelity["top1_agreement"] == pytest.approx(
        (200 * by_source["text"] + 100 * by_source["code"]) / 300
    )


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_every_cluster_size_and_precision(
    build_one: Build, model: ModelSource, size: int, bits: int
) -> None:
    options: dict[str, Any] = {"cluster_size": size, "centroid_bits": bits, "num_probes": None}
    index = build_one(**options, centroid_kind="unit_norm" if size == 8 else "mean")
    manifest = load_manifest(index)
    assert (manifest.cluster_size, manifest.bits) == (size, bits)
    shards = [load_shard(index, tp_rank=rank, tp_size=3, model=model) for rank in range(3)]
    rows = torch.stack([shard.embedding_lookup(torch.arange(V)) for shard in shards]).sum(0)
    assert torch.equal(rows, model.read_rows(0, V))
    held = sum(shard.shard.centroids.nbytes for shard in shards)
    assert held == manifest.centroid_bytes
    scales = 0 if bits == 16 else 2
    assert held == manifest.num_clusters * (D * bits // 8 + scales)


def test_pinned_tokens_are_learned_from_the_calibration_states_alone(
    build_one: Build, model: ModelSource, index_states: tuple[HiddenStates, HiddenStates]
) -> None:
    calibration, test = index_states
    index = build_one("index", num_probes=8)
    learned = load_manifest(index).calibration["learned_pinned_token_ids"]
    assert 0 < len(learned) <= 8
    assert _pinned(index) == learned
    best = (calibration.states.float() @ model.read_rows(0, V).float().T).argmax(1)
    # Row v equals row 1012 - v, and either may be found to be the best.
    assert {min(token, V - 1 - token) for token in learned} <= set(
        torch.minimum(best, V - 1 - best).tolist()
    )
    elsewhere = build_one("elsewhere", num_probes=8, test=calibration)
    assert _data(elsewhere) == _data(index)
    swapped = build_one("swapped", num_probes=8, calibration=test)
    assert _data(swapped) != _data(index)
    none = build_one("none", num_probes=8, learned_pins_per_group=0)
    assert _pinned(none) == []


@pytest.mark.parametrize("learned", [0, 1])
def test_centroids_are_rounded_for_the_calibration_states(
    build_one: Build, model: ModelSource, learned: int
) -> None:
    """An index of the same clusters without states would hold the plain rounding."""
    shard = load_shard(build_one(learned_pins_per_group=learned, num_probes=8)).shard
    ids = shard.token_ids.flatten(0, 1)
    means, plain_spread = describe_clusters(model.read_rows(0, V), ids)
    assert not torch.allclose(plain_spread, shard.spread.flatten(), rtol=0.05)
    plain = quantize_centroids(means, 4, 64).dequantize()
    found = shard.centroids.dequantize().flatten(0, 1)
    assert float((found - means).abs().max()) < float(means.abs().max())
    # All is the same where rounding is plain; nearly no centroid is where it is not.
    assert float((found == plain).all(1).double().mean()) < 0.1


def test_given_pins_are_kept_beside_the_learned_ones(build_one: Build) -> None:
    index = build_one(pinned_token_ids=(900, 7), num_probes=8)
    learned = load_manifest(index).calibration["learned_pinned_token_ids"]
    assert learned
    assert _pinned(index) == sorted({7, 900, *learned})
    ids = load_shard(index).shard.token_ids
    assert sorted([*ids[ids >= 0].tolist(), *_pinned(index)]) == list(range(V))


@pytest.mark.parametrize("calibrated", [True, False])
def test_special_tokens_are_pinned_and_take_the_place_of_learned_ones(
    build_one: Build, model: ModelSource, calibrated: bool
) -> None:
    """Six of eight slots of one pin a group: two are left to learn. An id past V is no row."""
    named = SimpleNamespace(all_special_ids=[5, 17, 17, 21, 30, 31, 40, V])
    special = [5, 17, 21, 30, 31, 40]
    told = replace(model, tokenizer_loader=lambda: named)
    given: dict[str, Any] = {} if calibrated else {"calibration": None}
    index = build_one("named", model=told, num_probes=8, **given)
    evidence = load_manifest(index).calibration
    learned = evidence.get("learned_pinned_token_ids", [])
    assert len(learned) <= 2
    assert _pinned(index) == sorted({*special, *learned})
    assert load_manifest(index).num_pinned == 1
    assert evidence.get("special_token_ids", special) == special
    without = build_one("plain", model=told, num_probes=8, pin_special_tokens=False, **given)
    assert not {*special} & {*_pinned(without)} - {*learned}
    assert len(_pinned(without)) <= 8


def test_a_token_that_a_pin_leaves_alone_keeps_its_clusters_spread(
    build_one: Build, model: ModelSource
) -> None:
    """A lone row strays from nothing: with a spread of 0 alpha would put all others before it."""
    given: dict[str, Any] = {"num_probes": 8, "calibration": None}
    whole = load_shard(build_one("whole", **given)).shard
    widest = divmod(int(whole.spread.argmax()), whole.spread.shape[1])
    *special, alone = whole.token_ids[widest].tolist()
    named = SimpleNamespace(all_special_ids=special)
    told = replace(model, tokenizer_loader=lambda: named)
    pinned = load_shard(build_one("pinned", model=told, **given)).shard
    assert sorted(pinned.token_ids[widest].tolist()) == [-1, -1, -1, alone]
    assert whole.spread[widest] > 0
    assert torch.equal(pinned.spread, whole.spread)


def test_without_states_nothing_is_learned(build_one: Build) -> None:
    manifest = load_manifest(build_one(calibration=None, test=None))
    assert (manifest.alpha, manifest.metric_exponent, manifest.num_pinned) == (0.0, 0.0, 0)
    assert manifest.calibration == manifest.fidelity == {}
