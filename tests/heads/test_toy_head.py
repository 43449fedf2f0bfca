"""A head that no file of the project names goes through scale, report and cost without an edit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
from torch import Tensor

from flashhead_dist.heads.base import Head, HeadOutput, HeadShape, HeadStyle, Want, share_of
from flashhead_dist.heads.dense import DenseLocalMax
from flashhead_dist.heads.registry import HEADS, build_head, emulate_head, head_cost, register
from flashhead_dist.models import open_model
from flashhead_dist.parallel import Steps, TensorParallel
from flashhead_topology.cost import HeadWork, Part
from flashhead_topology.systems import load_system
from tests.launch.scripts import load_script

LAUNCH = Path(__file__).parents[2] / "launch"


class ToyHead(Head):
    """The dense head of another file, under a name, a colour and costs of its own."""

    name: ClassVar[str] = "toy"
    style: ClassVar[HeadStyle] = HeadStyle("#123456", "d")

    def __init__(self, inner: Head) -> None:
        super().__init__(inner.tp, inner.shape)
        self.inner = inner

    @classmethod
    def load(cls, builder: Any, num_probes: int | None, alpha: float | None) -> Head:
        return cls(DenseLocalMax.load(builder, num_probes, alpha))

    @classmethod
    def work(cls, shape: HeadShape, tp_size: int, batch: int = 1, tp_rank: int = 0) -> HeadWork:
        num_bytes = 7 * share_of(shape.vocab_size, tp_size, tp_rank)
        part = Part(float(num_bytes), 1.0)
        return HeadWork({"head/candidates": part}, (), {"cuda": 1, "cpu": 1}, num_bytes)

    def steps(self, hidden_states: Tensor, want: Want) -> Steps[HeadOutput]:
        return (yield from self.inner.steps(hidden_states, want))

    @property
    def weight_bytes(self) -> int:
        return self.inner.weight_bytes


@pytest.fixture(autouse=True)
def toy() -> Iterator[None]:
    register(ToyHead)
    yield
    del HEADS[ToyHead.name]


@pytest.fixture
def scale(own_cache: Path) -> Iterator[ModuleType]:
    assert own_cache.is_dir()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(LAUNCH))
        yield load_script("scale")


def test_scale_measures_it_and_its_page_draws_it(
    scale: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--synthetic", "2000,64", "--heads", "toy,dense_local_max", "--iters", "2", "--json"]
    assert scale.main([*given, "--batch-sizes", "1,2", "--runs-dir", str(tmp_path)]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    toys = [record for record in document["records"] if record["head"] == "toy"]
    assert [record["batch_size"] for record in toys] == [1, 2]
    assert {record["top1_agreement"] for record in toys} == {1.0}
    assert {record["read_bytes_by_rank"][0] for record in toys} == {7 * 2000}
    page = (Path(document["run_dir"]) / "report" / "report.html").read_text()
    assert "toy" in page
    assert ToyHead.style.color in page.lower()


def test_the_cost_model_asks_it() -> None:
    shape, system = HeadShape(vocab_size=1 << 20, hidden_size=64), load_system("h100-infiniband")
    bandwidth = system.memory_bandwidth_bytes_per_s * system.memory_share
    for tp_size in (1, 4):
        cost = head_cost("toy", shape, system, tp_size=tp_size)
        assert cost.read_bytes == 7 * (1 << 20) // tp_size
        read_s = cost.read_bytes / bandwidth
        assert cost.total_s == pytest.approx(read_s + system.launch_s, rel=0.01)


@pytest.mark.parametrize("tp_size", [2, 3])
def test_its_ranks_are_emulated_like_any_other(tp_size: int, own_cache: Path) -> None:
    assert own_cache.is_dir()
    import torch

    model = open_model(synthetic="2000,64")
    states = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    alone = build_head("dense_local_max", tp=TensorParallel.single(), model=model)
    sharded = emulate_head("toy", tp_size=tp_size, model=model)
    assert torch.equal(sharded.forward(states).token_ids, alone.forward(states).token_ids)
