"""Tuning beside a GPU: the simulation stays on the CPU, and heads are timed on the GPU."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import pytest
import torch

from flashhead_dist.index import IndexOptions
from flashhead_dist.tune import timing
from flashhead_dist.tune.points import Family, Point
from flashhead_dist.tune.scene import Scene
from flashhead_dist.tune.simulate import Simulator
from flashhead_dist.tune.timing import layout_of, time_points
from tests.cuda_simulated.conftest import HIDDEN_SIZE, OPTIONS, Small
from tests.tune.tune_scene import make_scene

if TYPE_CHECKING:
    from simulated_cuda import SimulatedCuda

FAMILY = Family(cluster_size=4, centroid_bits=4, group_size=32, centroid_columns=HIDDEN_SIZE)
ALPHAS = (0.0, 0.5)


@pytest.fixture(scope="module")
def scene(small: Small) -> Scene:
    rows = small.model.read_rows(0, small.model.vocab_size)
    return make_scene(rows, small.states[:12], IndexOptions(**OPTIONS))


@pytest.fixture(scope="module")
def cpu_ranks(scene: Scene) -> torch.Tensor:
    return Simulator(scene).ranks(FAMILY, ALPHAS)


def test_settings_are_simulated_alike_beside_a_gpu(
    cuda: SimulatedCuda, scene: Scene, cpu_ranks: torch.Tensor
) -> None:
    assert torch.equal(Simulator(scene).ranks(FAMILY, ALPHAS), cpu_ranks)
    assert not cuda.commands


def test_points_are_timed_on_the_gpu(
    cuda: SimulatedCuda, small: Small, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "_WARM_UP", 1)
    monkeypatch.setattr(timing, "_NUM_STATES", 4)
    point = Point.of(FAMILY, alpha=0.5, probes_per_group=3)
    layout = layout_of(asdict(point), scene.shape)
    assert layout is not None
    (found,) = time_points(
        [asdict(point)], layout, scene, small.model, batch_sizes=(2,), iterations=2, threads=1,
        device="cuda:0",
    )  # fmt: skip
    assert found["median_us"] > 0
    assert {launch.device for launch in cuda.launches} == {torch.device("cuda:0")}
