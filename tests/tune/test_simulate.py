"""What is simulated is what the index does: ranks, bytes and rounded rows."""

from __future__ import annotations

from dataclasses import asdict, replace
from itertools import combinations
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flashhead_dist.index import IndexOptions, build_index, load_manifest, load_shard
from flashhead_dist.index.calibrate import probe_ranks
from flashhead_dist.index.layout import lay_out
from flashhead_dist.models import open_model
from flashhead_dist.tune.settings import Family, Setting, Shape
from flashhead_dist.tune.simulate import Simulator, TuningData, halve, resize, survives
from flashhead_dist.tune.timing import layout_of
from tests.tune.small_data import make_data

V, D, G, N = 1000, 64, 8, 300
OPTIONS = IndexOptions(num_groups=G)
FAMILY = Family(cluster_size=4, centroid_bits=4, group_size=64, centroid_columns=D)


@pytest.fixture(scope="module")
def data() -> TuningData:
    """A thousand tokens, which leave pads, and states near some of them."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(V, D, generator=generator).to(torch.bfloat16)
    near = weights[torch.randint(V, (N,), generator=generator)].float()
    states = (near + 2.5 * torch.randn(N, D, generator=generator)).to(torch.bfloat16)
    return make_data(weights, states, OPTIONS)


@pytest.mark.parametrize(
    "stored", [{}, {"centroid_bits": 16}, {"centroid_columns": 32, "group_size": 32}]
)
def test_ranks_are_those_of_the_index(data: TuningData, stored: dict[str, int]) -> None:
    # Fails where clusters are dealt in blocks, states are not rounded, spread is left out, or does
    # not have what fewer columns leave out.
    options = IndexOptions(num_groups=G, **stored)
    tensors = lay_out(data.weights, data.slots, (), options, data.moment)
    alphas = (0.0, 1.25)
    expected = probe_ranks(tensors, data.states, data.top_tokens[:, 0], alphas)
    ranks = Simulator(data).ranks(replace(FAMILY, **stored), alphas)
    assert int(expected.max()) > 3
    # A product in another order may turn the last bit of a score.
    assert float((ranks != expected).double().mean()) < 0.01


def test_bytes_are_those_of_the_manifest(data: TuningData, tmp_path: Path) -> None:
    model = open_model(None, synthetic="1024,64")
    shape = Shape(1024, 64, G)
    setting = Setting.of(FAMILY, alpha=1.0, probes_per_group=3)
    options = setting.index_options(shape, num_probes=3 * G, learned_pins_per_group=0)
    path = build_index(model, options, calibration=None, test=None, out=tmp_path / "index")
    assert shape.bytes_share(setting) == pytest.approx(load_manifest(path).bytes_share)
    load_shard(path)


def test_int8_rows_have_no_layout() -> None:
    record = asdict(Setting.of(FAMILY, alpha=1.0, probes_per_group=3))
    assert layout_of(record, Shape(V, D, G)) is not None
    assert layout_of(record | {"row_bits": 8}, Shape(V, D, G)) is None


def test_fewer_columns_read_less_and_find_fewer(data: TuningData) -> None:
    shape = Shape(262144, 128, 128)
    family = replace(FAMILY, centroid_columns=128)
    assert shape.centroid_share(replace(family, centroid_columns=64)) < shape.centroid_share(family)
    simulator = Simulator(data)
    ranks = simulator.ranks(FAMILY, (0.0,))[0]
    fewer = simulator.ranks(replace(FAMILY, centroid_columns=16, group_size=16), (0.0,))[0]
    assert float(fewer.double().mean()) > float(ranks.double().mean())


def _spread_of(ids: Tensor, vectors: Tensor) -> float:
    rows = vectors[ids]
    return float((rows - rows.mean(0)).square().sum())


def test_halves_are_the_best_of_all(data: TuningData) -> None:
    whole = (data.slots >= 0).all(1)
    slots = data.slots[whole][:20]
    halves = halve(slots, data.vectors).view(-1, 2, 2)
    for cluster, (left, right) in zip(slots, halves, strict=True):
        assert sorted([*left.tolist(), *right.tolist()]) == sorted(cluster.tolist())
        found = _spread_of(left, data.vectors) + _spread_of(right, data.vectors)
        best = min(
            _spread_of(cluster[list(pair)], data.vectors)
            + _spread_of(cluster[[p for p in range(4) if p not in pair]], data.vectors)
            for pair in combinations(range(4), 2)
        )
        assert found == pytest.approx(best, rel=1e-4)


def test_unions_are_neighbours_in_the_tree(data: TuningData) -> None:
    unions = resize(data.slots, data.vectors, 16)
    assert torch.equal(unions.flatten(), data.slots.flatten())
    with pytest.raises(ValueError, match="unions"):
        resize(data.slots[:-1], data.vectors, 16)


def test_a_token_is_lost_where_two_of_its_group_look_better() -> None:
    # Fails where tokens of other groups count as rivals, or where one rival is enough.
    logits = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [1.5, 1.0, 2.0]])
    groups = torch.tensor([[0, 0, 0], [0, 1, 0], [-1, -1, -1], [3, 3, 3]])
    assert survives(logits, groups).tolist() == [False, True, True, True]


def test_int8_logits_are_near(data: TuningData) -> None:
    exact = (data.states.float() @ data.weights.float().T).gather(1, data.top_tokens)
    error = (Simulator(data).int8_logits - exact).abs().max()
    assert 0 < float(error) < 0.02 * float(exact.max())
