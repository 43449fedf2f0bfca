"""What is simulated is what the index does: ranks, bytes, levels and rounded rows."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flashhead_dist.index import IndexOptions, build_index, load_manifest, load_shard
from flashhead_dist.index.calibrate import probe_ranks
from flashhead_dist.index.layout import lay_out
from flashhead_dist.models import open_model
from flashhead_dist.tune.nested import halve, resize
from flashhead_dist.tune.points import Family, Point, Shape, index_options
from flashhead_dist.tune.row_rounding import int8_logits, survives
from flashhead_dist.tune.scene import Scene
from flashhead_dist.tune.simulate import Simulator
from tests.tune.tune_scene import make_scene

V, D, G, N = 1000, 64, 8, 300
OPTIONS = IndexOptions(num_groups=G)
FAMILY = Family(cluster_size=4, centroid_bits=4, group_size=64, centroid_columns=D)


@pytest.fixture(scope="module")
def scene() -> Scene:
    """A thousand tokens, which leave pads, and states near some of them."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(V, D, generator=generator).to(torch.bfloat16)
    near = weights[torch.randint(V, (N,), generator=generator)].float()
    states = (near + 2.5 * torch.randn(N, D, generator=generator)).to(torch.bfloat16)
    return make_scene(weights, states, OPTIONS)


@pytest.mark.parametrize(
    "stored", [{}, {"centroid_bits": 16}, {"centroid_columns": 32, "group_size": 32}]
)
def test_ranks_are_those_of_the_index(scene: Scene, stored: dict[str, int]) -> None:
    # Fails where clusters are dealt in blocks, states are not rounded, spread is left out, or does
    # not have what fewer columns leave out.
    options = IndexOptions(num_groups=G, **stored)
    tensors = lay_out(scene.weights, scene.slots, (), options, scene.moment)
    alphas = (0.0, 1.25)
    expected = probe_ranks(tensors, scene.states, scene.top_tokens[:, 0], alphas)
    ranks = Simulator(scene).ranks(replace(FAMILY, **stored), alphas)
    assert int(expected.max()) > 3
    # A product in another order may turn the last bit of a score.
    assert float((ranks != expected).double().mean()) < 0.01


def test_two_levels_keep_children_of_the_best_alone(scene: Scene) -> None:
    family = replace(FAMILY, cluster_size=2, coarse_size=8, kept_share=0.25)
    simulator = Simulator(scene)
    ranks = simulator.ranks(family, (0.0,))[0]
    leaves, coarse = simulator.clusters(2), simulator.clusters(8)
    both = (leaves.token_ids.reshape(-1, 8), coarse.token_ids)
    assert torch.equal(*(ids.sort(dim=1).values for ids in both))
    level = {size: simulator._rounded(simulator.clusters(size), family)[:2] for size in (2, 8)}
    num_coarse = len(coarse.token_ids)
    for state in range(0, N, 7):
        token = scene.top_tokens[state, 0]
        own = int((leaves.token_ids == token).any(1).nonzero()[0, 0])
        group = (own // 4) % G
        units = torch.arange(group, num_coarse, G)
        scores = {s: centroids @ states[state] for s, (centroids, states) in level.items()}
        kept = units[scores[8][units].topk(round(0.25 * len(units))).indices].tolist()
        children = sorted(4 * unit + child for unit in kept for child in range(4))
        if own not in children:
            assert int(ranks[state]) == 4 * len(units)
        else:
            before = sum(float(scores[2][c]) > float(scores[2][own]) for c in children)
            assert abs(int(ranks[state]) - before) <= 1


def test_bytes_are_those_of_the_manifest(scene: Scene, tmp_path: Path) -> None:
    model = open_model(None, synthetic="1024,64")
    point = Point.of(FAMILY, alpha=1.0, probes_per_group=3)
    options = index_options(point, 64, G)
    assert options is not None
    options = replace(options, num_probes=3 * G, learned_pins_per_group=0)
    path = build_index(model, options, calibration=None, test=None, out=tmp_path / "index")
    assert Shape(1024, 64, G).bytes_share(point) == pytest.approx(load_manifest(path).bytes_share)
    load_shard(path)


def test_what_no_head_runs_has_no_options() -> None:
    point = Point.of(FAMILY, alpha=1.0, probes_per_group=3)
    assert index_options(replace(point, coarse_size=16, kept_share=0.5), D, G) is None
    assert index_options(replace(point, second_order="blocks"), D, G) is None


def test_fewer_columns_read_less_and_find_fewer(scene: Scene) -> None:
    shape = Shape(262144, 128, 128)
    family = replace(FAMILY, centroid_columns=128)
    assert shape.centroid_share(replace(family, centroid_columns=64)) < shape.centroid_share(family)
    simulator = Simulator(scene)
    ranks = simulator.ranks(FAMILY, (0.0,))[0]
    fewer = simulator.ranks(replace(FAMILY, centroid_columns=16, group_size=16), (0.0,))[0]
    assert float(fewer.double().mean()) > float(ranks.double().mean())


def test_blocks_are_another_second_order_term(scene: Scene) -> None:
    simulator = Simulator(scene)
    blocks = replace(FAMILY, second_order="blocks")
    plain = simulator.ranks(FAMILY, (0.0, 1.0))
    of_blocks = simulator.ranks(blocks, (0.0, 1.0))
    assert torch.equal(plain[0], of_blocks[0])
    assert not torch.equal(plain[1], of_blocks[1])


def _spread_of(ids: Tensor, vectors: Tensor) -> float:
    rows = vectors[ids]
    return float((rows - rows.mean(0)).square().sum())


def test_halves_are_the_best_of_all(scene: Scene) -> None:
    whole = (scene.slots >= 0).all(1)
    slots = scene.slots[whole][:20]
    halves = halve(slots, scene.vectors).view(-1, 2, 2)
    for cluster, (left, right) in zip(slots, halves, strict=True):
        assert sorted([*left.tolist(), *right.tolist()]) == sorted(cluster.tolist())
        found = _spread_of(left, scene.vectors) + _spread_of(right, scene.vectors)
        best = min(
            _spread_of(cluster[list(pair)], scene.vectors)
            + _spread_of(cluster[[p for p in range(4) if p not in pair]], scene.vectors)
            for pair in combinations(range(4), 2)
        )
        assert found == pytest.approx(best, rel=1e-4)


def test_unions_are_neighbours_in_the_tree(scene: Scene) -> None:
    unions = resize(scene.slots, scene.vectors, 16)
    assert torch.equal(unions.flatten(), scene.slots.flatten())
    with pytest.raises(ValueError, match="unions"):
        resize(scene.slots[:-1], scene.vectors, 16)


def test_a_token_is_lost_where_two_of_its_group_look_better() -> None:
    # Fails where tokens of other groups count as rivals, or where one rival is enough.
    logits = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [1.5, 1.0, 2.0]])
    groups = torch.tensor([[0, 0, 0], [0, 1, 0], [-1, -1, -1], [3, 3, 3]])
    assert survives(logits, groups).tolist() == [False, True, True, True]


def test_int8_logits_are_near(scene: Scene) -> None:
    exact = (scene.states.float() @ scene.weights.float().T).gather(1, scene.top_tokens)
    error = (int8_logits(scene) - exact).abs().max()
    assert 0 < float(error) < 0.02 * float(exact.max())
