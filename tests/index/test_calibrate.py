"""What is said of an index on hidden states is what its heads then do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from flashhead_dist.index import IndexOptions, build_index, calibrate, load_manifest, load_shard
from flashhead_dist.index.calibrate import Found, choose_alpha, dense_argmax, missed_tokens
from flashhead_dist.index.options import ALPHAS
from flashhead_dist.models import ModelSource, open_model
from flashhead_dist.states import HiddenStates, synthetic_hidden_states
from flashhead_kernels import reference

V = 1013


@pytest.fixture(scope="module")
def model(tied_model: Path) -> ModelSource:
    return open_model(str(tied_model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_equal_logits_the_smallest_token_is_the_dense_argmax(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """Small integers, so that every sum is exact and the ties are true ones."""
    draw = torch.Generator().manual_seed(0)
    weights = torch.randint(-2, 3, (V, 6), generator=draw).to(dtype)
    states = torch.randint(-2, 3, (90, 6), generator=draw).to(torch.bfloat16)
    states[0] = 0
    monkeypatch.setattr(calibrate, "_CHUNK_TOKENS", 100)
    monkeypatch.setattr(calibrate, "_CHUNK_STATES", 40)
    counted: list[float] = []
    found = dense_argmax(weights, states, counted.append)
    logits = states.double() @ weights.double().T
    ties = logits == logits.amax(1, keepdim=True)
    assert int(ties.sum(1).max()) > 1
    assert torch.equal(found, ties.int().argmax(1))
    assert sum(counted) == pytest.approx(len(states))


def _among_candidates(index: Path, states: Tensor, tokens: Tensor, alpha: float) -> list[bool]:
    """Whether each token is pinned or in a probed cluster, by the rule of the heads."""
    shard, manifest = load_shard(index).shard, load_manifest(index)
    per_group = -(-manifest.num_probes // manifest.num_groups)
    scores = reference.score_centroids(states, shard, alpha)
    probes = reference.select_probes(scores, per_group).long()
    pinned = set(shard.pinned_token_ids.flatten().tolist())
    found = []
    for row, token in enumerate(tokens.tolist()):
        probed = {
            int(candidate)
            for group in range(manifest.num_groups)
            for candidate in shard.token_ids[group, probes[row, group]].flatten()
        }
        found.append(token in pinned | probed)
    return found


@pytest.mark.parametrize(("num_probes", "alpha"), [(8, None), (17, None), (32, None), (16, 0.5)])
def test_the_manifests_fidelity_is_that_of_the_rule_that_heads_follow(
    model: ModelSource, tmp_path: Path, num_probes: int, alpha: float | None
) -> None:
    calibration, _ = synthetic_hidden_states(model, num_states=200)
    sources = torch.arange(200) % 2
    # States that point at no row in particular: retrieval often misses the best.
    states = 0.4 * torch.randn(200, 64, generator=torch.Generator().manual_seed(11))
    test = HiddenStates(states.to(torch.bfloat16), sources, ("even", "odd"), "made up")
    out = build_index(
        model,
        IndexOptions(num_groups=8, num_probes=num_probes, alpha=alpha, pinned_token_ids=(3,)),
        calibration=calibration,
        test=test,
        out=tmp_path / "index",
        device="cpu",
        progress=False,
    )
    manifest = load_manifest(out)
    tokens = dense_argmax(model.read_rows(0, V), test.states)
    found = torch.tensor(_among_candidates(out, test.states, tokens, manifest.alpha)).double()
    assert 0 < float(found.mean()) < 1
    assert manifest.fidelity["top1_agreement"] == pytest.approx(float(found.mean()))
    by_source = manifest.fidelity["top1_agreement_by_source"]
    assert by_source["even"] == pytest.approx(float(found[sources == 0].mean()))
    assert by_source["odd"] == pytest.approx(float(found[sources == 1].mean()))
    evidence = manifest.calibration["top1_agreement_by_alpha"]
    best = max(
        evidence,
        key=lambda e: (e["top1_agreement_worst_source"], e["top1_agreement"], -e["alpha"]),
    )
    assert manifest.alpha == best["alpha"]
    assert len(evidence) == (len(ALPHAS) if alpha is None else 1)


def test_alpha_serves_the_worst_source_then_all_then_is_small() -> None:
    found = {
        0.0: Found(0.95, {"a": 0.99, "b": 0.80}),
        0.1: Found(0.8, {"a": 0.85, "b": 0.82}),
        0.2: Found(0.9, {"a": 0.82, "b": 0.95}),
        0.3: Found(0.9, {"a": 0.82, "b": 0.95}),
    }
    assert choose_alpha(found) == 0.2
    assert found[0.2].worst_source == "a"


def test_tokens_that_are_missed_most_often_are_pinned_first() -> None:
    tokens = torch.tensor([5, 5, 5, 9, 9, 2, 2, 2, 2, 7, 1, 1])
    ranks = torch.tensor([4, 5, 7, 4, 9, 2, 3, 2, 3, 1, 0, -1])
    # Half of 8 probes miss 5 three times and 9 twice, a quarter 2 four times.
    assert missed_tokens(ranks, tokens, 8, 1) == [5]
    assert missed_tokens(ranks, tokens, 8, 2) == [5, 9]
    assert missed_tokens(ranks, tokens, 8, 3) == [2, 5, 9]
    assert missed_tokens(ranks, tokens, 8, 10) == [2, 5, 9]
    assert missed_tokens(ranks, tokens, 8, 0) == []
