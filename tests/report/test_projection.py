"""Projections to other systems: the model's cost, its band, and nothing as measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import pytest

from flashhead_dist.errors import UserError
from flashhead_dist.heads.base import HeadShape
from flashhead_dist.heads.registry import head_cost
from flashhead_dist.report import projection
from flashhead_dist.report.figures import Section
from flashhead_dist.report.projection import (
    SHAPE_KEY,
    ModelError,
    compute_errors,
    default_sizes,
    head_shape,
    model_error,
    open_system,
    projection_section,
)
from flashhead_dist.report.runs import RunFolder
from flashhead_dist.report.tables import by_kind
from flashhead_topology.systems import Level, System
from tests.report.run_folders import environment_of, golden, run_of
from tests.report.test_sections import marks

pytest.importorskip("matplotlib")
SHAPE = HeadShape.with_default_index(vocab_size=262_144, hidden_size=640)
ERROR = ModelError(compute=0.1, exchange=0.5, source="Band: as a test has it.")
NODE = System(
    name="node",
    device="a test's",
    memory_bandwidth_bytes_per_s=1e12,
    launch_s=1e-6,
    levels=(Level("link", 8, 20e-6, 1e-11), Level("net", 64, 100e-6, 1e-10)),
)
NONE = pd.Series(dtype=float)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    environment = environment_of(golden()) | {SHAPE_KEY: asdict(SHAPE)}
    return run_of(tmp_path / "run", environment=environment)


def section_of(
    run: RunFolder, sizes: Sequence[int] | None = None, system: System = NODE
) -> Section:
    return projection_section(run, SHAPE, [system], sizes, ERROR)


def test_a_projection_is_the_models_cost_with_its_error_around(run: RunFolder) -> None:
    assert head_shape(run) == SHAPE
    frame = section_of(run, [1, 2, 4]).frame
    assert len(frame) == 3 * 2 * len(run.heads)
    row = frame.query("head == 'flashhead' and batch_size == 4 and tp_size == 4").iloc[0]
    cost = head_cost("flashhead", SHAPE, NODE, tp_size=4, batch_size=4)
    off_us = (0.1 * cost.compute_s + 0.5 * cost.exchange_s) * 1e6
    assert row.projected_step_us == pytest.approx(cost.total_s * 1e6)
    assert row.projected_low_us == pytest.approx(cost.total_s * 1e6 - off_us)
    assert row.projected_high_us == pytest.approx(cost.total_s * 1e6 + off_us)
    assert row.projected_exchange_us > 0


def test_sizes_go_up_to_what_the_system_joins() -> None:
    assert default_sizes(NODE) == [1, 2, 4, 8, 16, 32, 64]
    assert default_sizes(open_system("h100-infiniband"))[-1] == 1024


def test_every_figure_of_a_projection_is_called_projected(run: RunFolder) -> None:
    section = section_of(run)
    figures = set(section.frame) - {"system", "batch_size", "head", "tp_size", "carried_by"}
    assert figures
    assert all(key.startswith("projected_") for key in figures)
    ((title, _),) = by_kind(section.frame)
    assert "PROJECTED" in title
    titles = marks(section.charts)
    assert titles
    assert all("PROJECTED" in title for title in titles)


def test_the_fastest_size_is_named_where_more_ranks_gain_nothing(run: RunFolder) -> None:
    """A link of 20 us: a 270M head gains nothing from a second rank, the dense one does."""
    notes = [note for note in section_of(run).notes if note.startswith("node, batch 1: ")]
    product, dense = notes
    assert "nothing" in product
    assert "fastest at tp" in dense


def test_a_size_that_a_head_cannot_be_sharded_over_is_left_out_and_named(run: RunFolder) -> None:
    section = section_of(run, [1, 256], open_system("h100-infiniband"))
    assert set(section.frame.query("head == 'flashhead'").tp_size) == {1}
    assert "128 probing groups" in section.notes[-1]


def test_mistakes_in_what_to_project_are_the_users(run: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no system named"):
        open_system("h1000")
    with pytest.raises(UserError, match="node joins 64 ranks"):
        section_of(run, [65])
    with pytest.raises(UserError, match="measure again"):
        head_shape(run_of(tmp_path / "bare"))
    damaged = environment_of(golden()) | {SHAPE_KEY: {"vocab_size": 0, "hidden_size": 1}}
    with pytest.raises(UserError, match="is damaged at head_shape"):
        head_shape(run_of(tmp_path / "damaged", environment=damaged))


def test_the_model_is_compared_with_measured_cells_alone(run: RunFolder) -> None:
    errors = compute_errors(run, SHAPE, NODE)
    assert len(errors) == sum(record.measured for record in run.records)
    (first,) = [
        i
        for i, r in enumerate(r for r in run.records if r.measured)
        if (r.head, r.tp_size, r.batch_size) == ("flashhead", 1, 1)
    ]
    cost = head_cost("flashhead", SHAPE, NODE, tp_size=1)
    assert errors[first] == pytest.approx(cost.compute_s / 4000e-6 - 1)
    assert model_error(errors, "node").compute == pytest.approx(errors.abs().mean())


def test_an_unknown_error_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projection, "VALIDATION_NAME", "nowhere.yaml")
    error = model_error(NONE, None)
    assert (error.compute, error.exchange) == (None, None)
    assert "nowhere.yaml is not shipped" in error.source


def test_the_shipped_error_is_the_worst_operation(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "validation.yaml").write_text(
        "source: a test\noperations:\n  all_reduce: {mean_relative_error: 0.1}\n"
        "  all_gather: {mean_relative_error: 0.2}\n  small: {mean_relative_error: 0.7}\n"
    )
    monkeypatch.setattr(projection, "files", lambda _: tmp_path)
    error = model_error(NONE, None)
    assert (error.exchange, error.small_exchange) == (0.2, 0.7)
    for head, share in (("flashhead", 0.7), ("dense_gather", 0.2)):
        cost = head_cost(head, SHAPE, NODE, tp_size=4)
        assert error.band_s(cost)[1] == pytest.approx(cost.total_s + share * cost.exchange_s)
    (tmp_path / "validation.yaml").write_text("operations: 3\n")
    with pytest.raises(UserError, match=r"validation.yaml of flashhead_topology is damaged"):
        model_error(NONE, None)
