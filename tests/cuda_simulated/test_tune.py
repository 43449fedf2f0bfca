"""Tuning beside a GPU: the simulation stays on the CPU, and heads are timed on the GPU."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import pytest
import torch

from flashhead_dist.index import IndexOptions
from flashhead_dist.tune import timing
from flashhead_dist.tune.settings import Family, Setting
from flashhead_dist.tune.simulate import Simulator, TuningData
from flashhead_dist.tune.timing import TimingPlan, layout_of, time_layout
from tests.cuda_simulated.conftest import HIDDEN_SIZE, OPTIONS, Small
from tests.tune.small_data import make_data

if TYPE_CHECKING:
    from simulated_cuda import SimulatedCuda

FAMILY = Family(cluster_size=4, centroid_bits=4, group_size=32, centroid_columns=HIDDEN_SIZE)
ALPHAS = (0.0, 0.5)


@pytest.fixture(scope="module")
def data(small: Small) -> TuningData:
    rows = small.model.read_rows(0, small.model.vocab_size)
    return make_data(rows, small.states[:12], IndexOptions(**OPTIONS))


@pytest.fixture(scope="module")
def cpu_ranks(data: TuningData) -> torch.Tensor:
    return Simulator(data).ranks(FAMILY, ALPHAS)


def test_settings_are_simulated_alike_beside_a_gpu(
    cuda: SimulatedCuda, data: TuningData, cpu_ranks: torch.Tensor
) -> None:
    assert torch.equal(Simulator(data).ranks(FAMILY, ALPHAS), cpu_ranks)
    assert not cuda.commands


def test_settings_are_timed_on_the_gpu(
    cuda: SimulatedCuda, small: Small, data: TuningData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "_WARM_UP", 1)
    monkeypatch.setattr(timing, "_NUM_STATES", 4)
    setting = Setting.of(FAMILY, alpha=0.5, probes_per_group=3)
    layout = layout_of(asdict(setting), data.shape)
    assert layout is not None
    plan = TimingPlan([2], iterations=2, threads=1, device="cuda:0")
    (found,) = time_layout([asdict(setting)], layout, data, small.model, plan)
    assert found["median_us"] > 0
    assert {launch.device for launch in cuda.launches} == {torch.device("cuda:0")}
