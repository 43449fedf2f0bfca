"""Indexes of heads with odd rows and uneven vocabularies: built, faithful, balanced, equal."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from flashhead_dist.evaluate.robustness import (
    LLAMA_3,
    QWEN_3,
    SOURCES,
    HeadSpec,
    made_states,
    make_head,
    robustness_specs,
    try_head,
)
from flashhead_dist.index import IndexOptions, build_index, load_shard
from flashhead_dist.index.options import CentroidKind

LAUNCH = Path(__file__).parents[2] / "launch"
SMALL = robustness_specs(128, 64)


@pytest.mark.parametrize("spec", [LLAMA_3, QWEN_3], ids=lambda spec: spec.name)
def test_a_made_head_has_the_figures_that_it_names(spec: HeadSpec) -> None:
    small = next(s for s in robustness_specs(16, 128) if s.name == spec.name)
    head = make_head(small)
    assert head.rows.shape == (small.vocab_size, 128)
    ordinary = torch.ones(small.vocab_size, dtype=torch.bool)
    ordinary[head.odd] = False
    rows = head.rows[ordinary].float()
    norms = rows.norm(dim=1)
    assert float(norms.mean()) == pytest.approx(spec.norm, rel=0.02)
    assert float(norms.std()) == pytest.approx(spec.norm_std, rel=0.05)
    unit = rows / norms.unsqueeze(1)
    # The mean cosine of two rows is the square of their mean's norm.
    assert float(unit.mean(0).norm() ** 2) == pytest.approx(spec.common_share, abs=0.04)
    values = torch.linalg.eigvalsh(torch.cov(unit.T)).flip(0)
    slope = torch.log(values[8] / values[64]) / torch.log(torch.tensor(65 / 9))
    # 192 shared codes are few draws of the covariance, which spreads its eigenvalues.
    assert float(slope) == pytest.approx(spec.spectrum_exponent, abs=0.35)
    assert int((head.rows == 0).all(1).sum()) == small.zero_rows
    assert torch.equal(make_head(small).rows, head.rows)


def test_odd_rows_are_what_they_are_called() -> None:
    spec = next(spec for spec in SMALL if spec.name == "all-at-once")
    head = make_head(spec)
    norms = head.rows.float().norm(dim=1)
    assert int((norms > 10 * spec.norm).sum()) == spec.huge_rows > 0
    assert int((norms == 0).sum()) >= spec.zero_rows > 0
    # 1e-21 squared is nothing in float32, so that such a norm is 0 as well.
    tiny = (head.rows.abs().float().amax(1) < 1e-20) & (head.rows != 0).any(1)
    assert int(tiny.sum()) == spec.tiny_rows > 0
    distinct = torch.unique(head.rows.float(), dim=0)
    assert len(head.rows) - len(distinct) == spec.duplicates + spec.zero_rows - 1
    assert len(head.odd) == len(set(head.odd.tolist()))


@pytest.mark.parametrize("spec", SMALL, ids=lambda spec: spec.name)
def test_every_index_is_faithful_balanced_and_equal_at_every_tp_size(
    spec: HeadSpec, own_cache: Path
) -> None:
    assert own_cache.is_dir()
    options = IndexOptions(num_groups=16, group_size=32, num_probes=160)
    trial = try_head(spec, options=options, num_states=100, progress=False)
    assert trial.equal_tp_sizes == list(range(1, 9))
    assert trial.tokens_a_cluster[1] == 4
    # Whole groups of 16: the busiest rank has one more than the others at most.
    for tp_size, ratio in trial.work_max_over_mean.items():
        assert ratio == pytest.approx(-(-16 // tp_size) * tp_size / 16, rel=1e-6)
    assert trial.top1_logit_by_source["frequent"] > 0.95
    assert trial.top1_token <= trial.top1_logit
    assert trial.worst_top1_logit > 0.85
    sources = [name for name in SOURCES if name != "odd-rows" or len(make_head(spec).odd)]
    assert list(trial.top1_logit_by_source) == sources


@pytest.mark.parametrize("kind", ["mean", "unit_norm"])
@pytest.mark.parametrize("bits", [4, 16])
def test_zero_tiny_and_equal_rows_leave_every_number_finite(
    kind: CentroidKind, bits: int, tmp_path: Path
) -> None:
    """Fails where a row is divided by its norm, or int4 centroids by their greatest entry."""
    spec = HeadSpec(
        name="hopeless", vocab_size=501, hidden_size=64, norm=1.0, norm_std=0.2, tiny_rows=100,
        zero_rows=150, duplicates=200, huge_rows=10, huge_factor=1e4,
    )  # fmt: skip
    head = make_head(spec)
    calibration, _ = made_states(head, count=50)
    options = IndexOptions(
        num_groups=8, centroid_kind=kind, centroid_bits=bits, cluster_size=4, num_probes=16
    )
    index = build_index(
        head.model, options, calibration=calibration, test=None, out=tmp_path / "index",
        device="cpu", progress=False,
    )  # fmt: skip
    shard = load_shard(index).shard
    assert not bool(torch.isnan(shard.spread).any())
    scales = shard.centroids.scales if bits == 4 else shard.centroids.values
    assert scales is not None
    assert bool(torch.isfinite(scales.float()).all())
    found = torch.cat([shard.token_ids.flatten(), shard.pinned_token_ids.flatten()])
    assert sorted(found[found >= 0].tolist()) == list(range(501))


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_rows_that_are_all_alike_are_indexed(value: float, tmp_path: Path) -> None:
    spec = HeadSpec(name="flat", vocab_size=203, hidden_size=64, norm=1.0, norm_std=0.1)
    head = make_head(spec)
    head.rows.fill_(value)
    index = build_index(
        head.model, IndexOptions(num_groups=4, num_probes=8), calibration=None, test=None,
        out=tmp_path / "index", device="cpu", progress=False,
    )  # fmt: skip
    shard = load_shard(index).shard
    assert int(shard.num_tokens.sum()) == 203
    assert bool(torch.isfinite(shard.spread[shard.num_tokens > 0]).all())


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(LAUNCH))
    yield importlib.import_module("evaluate")
    sys.modules.pop("evaluate", None)


def test_the_command_prints_a_table_and_refuses_what_does_not_fit(
    launch: ModuleType, own_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert own_cache.is_dir()
    table = tmp_path / "out.csv"
    arguments = [
        "robustness", "--cases", "uneven", "--divisor", "256", "--hidden-size", "64",
        "--states", "20", "--groups", "8", "--threads", "1", "--csv", str(table),
    ]  # fmt: skip
    assert launch.main([*arguments, "--json"]) == 0
    (trial,) = json.loads(capsys.readouterr().out)["trials"]
    assert (trial["vocab_size"], trial["hidden_size"]) == (593, 64)
    assert trial["equal_tp_sizes"] == list(range(1, 9))
    assert table.read_text().startswith("name,")
    assert launch.main(arguments) == 0
    assert "1 to 8" in capsys.readouterr().out
    mistakes: dict[str, list[Any]] = {
        "'nosuch'": ["--cases", "nosuch"],
        "--divisor is 0": ["--divisor", "0"],
        "--states is 0": ["--states", "0"],
        "do not divide the hidden size 100": ["--hidden-size", "100"],
    }
    for value, given in mistakes.items():
        assert launch.main(["robustness", *given]) == 2
        assert value in capsys.readouterr().err
