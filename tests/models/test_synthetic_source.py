"""Synthetic rows: the same however they are sliced, clustered, and never taken for real."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flashhead_dist.errors import UserError
from flashhead_dist.models import ModelSource, open_model
from flashhead_dist.states import synthetic_hidden_states

V, D = 3001, 48


@pytest.fixture
def model(tmp_path: Path) -> ModelSource:
    return open_model(synthetic=f"{V},{D}", cache_dir=tmp_path)


def test_rows_do_not_depend_on_the_slices(model: ModelSource) -> None:
    whole = model.read_rows(0, V)
    assert whole.shape == (V, D)
    for size in (1000, 257, 255):
        pieces = [model.read_rows(i, min(i + size, V)) for i in range(0, V, size)]
        assert torch.equal(torch.cat(pieces), whole)
    assert torch.equal(model.read_columns(3, 11), whole[:, 3:11])
    assert torch.equal(model.read_rows(2999, 3000)[0], whole[2999])


def test_same_shape_same_rows_and_hash(model: ModelSource, tmp_path: Path) -> None:
    again = open_model(synthetic=f"{V},{D}", cache_dir=tmp_path)
    other = open_model(synthetic=f"{V + 1},{D}", cache_dir=tmp_path)
    assert torch.equal(again.read_rows(500, 600), model.read_rows(500, 600))
    assert again.weight_hash == model.weight_hash
    assert other.weight_hash != model.weight_hash
    assert not torch.equal(other.read_rows(500, 600), model.read_rows(500, 600))


def test_rows_are_clustered_and_scattered(model: ModelSource) -> None:
    rows = torch.nn.functional.normalize(model.read_rows(0, V).float(), dim=1)
    similarity = rows @ rows.T - 2 * torch.eye(V)
    nearest = similarity.max(dim=1)
    noise = torch.nn.functional.normalize(torch.randn(V, D), dim=1)
    unstructured = (noise @ noise.T - 2 * torch.eye(V)).max(dim=1).values.mean()
    assert nearest.values.mean() > unstructured + 0.15
    distance = (nearest.indices - torch.arange(V)).abs().float().mean()
    assert distance > V / 5, "clusters must not be runs of token ids"


def test_it_says_what_it_is(model: ModelSource) -> None:
    assert model.synthetic
    assert model.name == f"synthetic-{V}x{D}"
    assert model.path is None
    with pytest.raises(UserError, match="synthetic and has no body"):
        model.load_body()


def test_synthetic_states_point_at_tokens(model: ModelSource) -> None:
    calibration, test = synthetic_hidden_states(model, num_states=256)
    again, _ = synthetic_hidden_states(model, num_states=256)
    assert torch.equal(calibration.states, again.states)
    assert not torch.equal(calibration.states, test.states)
    assert test.sources == ("synthetic",)
    assert "synthetic" in test.origin
    logits = test.states.float() @ model.read_rows(0, V).float().T
    probability = logits.softmax(dim=1).max(dim=1).values
    assert 0.1 < probability.mean() < 0.999, "neither flat nor certain"
    assert logits.argmax(dim=1).unique().numel() > 30
