"""Projections to other systems: what is projected, with which band, and never as measured."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from flashhead_dist.errors import UserError
from flashhead_dist.heads.base import HeadShape
from flashhead_dist.heads.registry import head_cost
from flashhead_dist.report import model_error as model_errors
from flashhead_dist.report.model_error import ModelError, check_model, model_error
from flashhead_dist.report.outlook import (
    SHAPE_KEY,
    default_sizes,
    head_shape,
    open_system,
    outlooks,
)
from flashhead_dist.report.runs import Run
from flashhead_dist.report.sections.projection import projection_section
from flashhead_dist.report.tables_html import table_views
from flashhead_topology.systems import Level, System
from tests.report.made_up import environment_of, golden, run_of
from tests.report.test_sections import marks

pytest.importorskip("matplotlib")
SHAPE = HeadShape.with_default_index(vocab_size=262_144, hidden_size=640)
ERROR = ModelError(compute=0.1, exchange=0.5, words="Band: as a test has it.")
NODE = System(
    name="node",
    device="a test's",
    memory_bandwidth_bytes_per_s=1e12,
    launch_s=1e-6,
    levels=(Level("link", 8, 20e-6, 1e-11), Level("net", 64, 100e-6, 1e-10)),
)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    environment = environment_of(golden()) | {SHAPE_KEY: asdict(SHAPE)}
    return run_of(tmp_path / "run", environment=environment)


def test_what_is_projected_is_the_models_cost_with_its_error_around(run: Run) -> None:
    found = outlooks(run, head_shape(run), NODE, [1, 2, 4], ERROR)
    assert [(o.head, o.batch_size) for o in found] == [
        (head, batch_size) for batch_size in (1, 4) for head in run.heads
    ]
    (mine,) = (o for o in found if (o.head, o.batch_size) == ("flashhead", 4))
    cost = head_cost("flashhead", SHAPE, NODE, tp_size=4, batch_size=4)
    assert mine.costs[4] == cost
    off_s = 0.1 * cost.compute_s + 0.5 * cost.exchange_s
    assert mine.bands[4] == pytest.approx((cost.total_s - off_s, cost.total_s + off_s))
    assert cost.exchange_s > 0


def test_sizes_go_up_to_what_the_system_joins() -> None:
    assert default_sizes(NODE) == [1, 2, 4, 8, 16, 32, 64]
    assert default_sizes(open_system("h100-infiniband"))[-1] == 1024


def test_every_figure_of_a_projection_is_called_projected(run: Run) -> None:
    section = projection_section(outlooks(run, SHAPE, NODE, None, ERROR), ERROR)
    figures = set(section.frame) - {"system", "batch_size", "head", "tp_size", "carried_by"}
    assert figures
    assert all(name.startswith("projected_") for name in figures)
    (table,) = table_views(section.frame)
    assert table.projected
    titles = [title for plot in section.plots for title in marks(plot.svg)]
    assert titles
    assert all("PROJECTED" in title for title in titles)
    assert all(plot.words.startswith("PROJECTED") for plot in section.plots)
    assert ERROR.words in section.notes


def test_where_the_exchange_eats_the_gain_is_said(run: Run) -> None:
    """A link of 20 us: a 270M head gains nothing from a second rank, the dense one does."""
    section = projection_section(outlooks(run, SHAPE, NODE, None, ERROR), ERROR)
    (said,) = (note for note in section.notes if note.startswith("node, batch 1: "))
    assert "more ranks gain nothing" in said
    assert "dense_local_max is fastest on" in said


def test_a_size_that_a_head_cannot_be_split_over_is_left_out_and_said(run: Run) -> None:
    found = outlooks(run, SHAPE, open_system("h100-infiniband"), [1, 256], ERROR)
    mine = next(o for o in found if o.head == "flashhead")
    assert list(mine.costs) == [1]
    notes = projection_section(found, ERROR).notes
    assert any("128 probing groups" in note for note in notes)


def test_mistakes_in_what_to_project_are_sentences(run: Run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no system named"):
        open_system("h1000")
    with pytest.raises(UserError, match="node joins 64 ranks"):
        outlooks(run, SHAPE, NODE, [65], ERROR)
    with pytest.raises(UserError, match="does not tell the head's shape"):
        head_shape(run_of(tmp_path / "bare"))
    damaged = environment_of(golden()) | {SHAPE_KEY: {"vocab_size": 0, "hidden_size": 1}}
    with pytest.raises(UserError, match="is damaged at head_shape"):
        head_shape(run_of(tmp_path / "damaged", environment=damaged))


def test_the_model_is_held_against_measured_cells_alone(run: Run) -> None:
    checks = check_model(run, SHAPE, NODE)
    assert {check.tp_size for check in checks} == {1, 2}
    first = next(c for c in checks if (c.head, c.tp_size, c.batch_size) == ("flashhead", 1, 1))
    cost = head_cost("flashhead", SHAPE, NODE, tp_size=1)
    assert first.compute_error == pytest.approx(cost.compute_s / 4000e-6 - 1)
    error = model_error(checks, "node")
    assert error.compute == pytest.approx(sum(abs(c.compute_error) for c in checks) / len(checks))
    assert f"over {len(checks)} cells of this run on node" in error.words


def test_an_error_that_is_not_known_is_said_to_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_errors, "VALIDATION_NAME", "nowhere.yaml")
    error = model_error([], None)
    assert (error.compute, error.exchange) == (None, None)
    assert "missing, because nowhere.yaml is not shipped" in error.words
    assert "error of compute is not known" in error.words


def test_the_shipped_error_is_the_worst_operation(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "validation.yaml").write_text(
        "source: a test\noperations:\n  all_reduce: {mean_relative_error: 0.1}\n"
        "  all_gather: {mean_relative_error: 0.2}\n  small: {mean_relative_error: 0.7}\n"
    )
    monkeypatch.setattr(model_errors, "files", lambda _: tmp_path)
    error = model_error([], None)
    assert (error.exchange, error.small_exchange) == (0.2, 0.7)
    for head, share in (("flashhead", 0.7), ("dense_gather", 0.2)):
        cost = head_cost(head, SHAPE, NODE, tp_size=4)
        assert error.band_s(cost)[1] == pytest.approx(cost.total_s + share * cost.exchange_s)
    assert "(all_gather)" in error.words
    (tmp_path / "validation.yaml").write_text("operations: 3\n")
    with pytest.raises(UserError, match=r"validation.yaml of flashhead_topology is damaged"):
        model_error([], None)
