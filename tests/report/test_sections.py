"""The parts of the page from golden records: what is drawn, what is measured, what is missing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pandas as pd
import pytest

from flashhead_dist.errors import UserError
from flashhead_dist.report.runs import Run
from flashhead_dist.report.section import Section
from flashhead_dist.report.sections.crossover import crossover_section
from flashhead_dist.report.sections.fidelity import fidelity_section, wilson_interval
from flashhead_dist.report.sections.latency import latency_section
from flashhead_dist.report.sections.memory import memory_section
from flashhead_dist.report.sections.pipeline import pipeline_section
from flashhead_dist.report.sections.scaling import scaling_section
from flashhead_dist.report.sections.setting import setting_frame, standing_of, warnings_of
from flashhead_dist.report.sections.wire import wire_section
from tests.report.made_up import changed, environment_of, golden, pipeline_document, run_of

pytest.importorskip("matplotlib")
SVG = "{http://www.w3.org/2000/svg}"
ALL: list[Callable[[Run], Section]] = [
    latency_section, scaling_section, wire_section, fidelity_section, crossover_section,
    memory_section, pipeline_section,
]  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return run_of(tmp_path / "run", pipeline=pipeline_document())


def marks(svg: str) -> list[str]:
    """Titles of the data marks of a plot."""
    found = ElementTree.fromstring(svg).iter(f"{SVG}g")
    return [group.findtext(f"{SVG}title", "") for group in found if group.get("class") == "mark"]


@pytest.mark.parametrize("make", ALL)
def test_every_plot_holds_the_marks_it_says(make: Callable[[Run], Section], run: Run) -> None:
    section = make(run)
    assert section.missing is None
    assert section.plots
    for plot in section.plots:
        assert len(marks(plot.svg)) == plot.num_marks > 0


def test_measured_and_projected_latencies_share_no_column(run: Run) -> None:
    frame = latency_section(run).frame
    projected = frame[frame.tp_size == 8]
    assert projected.filter(like="measured_").isna().all(axis=None)
    assert frame[frame.tp_size < 8].filter(like="projected_").isna().all(axis=None)
    assert list(projected.projected_median_us) == [r.median_us for r in golden() if r.tp_size == 8]


def test_projected_points_say_so(run: Run) -> None:
    titles = [title for plot in latency_section(run).plots for title in marks(plot.svg)]
    assert {"PROJECTED" in title for title in titles if ", tp 8:" in title} == {True}
    assert {"PROJECTED" in title for title in titles if ", tp 2:" in title} == {False}
    assert "flashhead, tp 2: 2,150 µs" in titles


def test_scaling_is_against_the_same_head_on_one_rank(run: Run) -> None:
    frame = scaling_section(run).frame
    row = frame[(frame["head"] == "flashhead") & (frame.tp_size == 2) & (frame.batch_size == 1)]
    (found,) = row.to_dict("records")
    assert found["measured_speedup"] == pytest.approx(4000 / 2150)
    assert found["measured_scaling_efficiency"] == pytest.approx(4000 / 2150 / 2)
    assert found["measured_speedup_p10"] == pytest.approx(4000 / 2580)
    assert pd.isna(found["projected_speedup"])


@pytest.mark.parametrize(
    ("sizes", "why"), [({1}, "one tp_size was measured"), ({2, 8}, "nothing was measured at tp 1")]
)
def test_scaling_needs_one_rank_and_more(tmp_path: Path, sizes: set[int], why: str) -> None:
    run = run_of(tmp_path / "run", [r for r in golden() if r.tp_size in sizes])
    section = scaling_section(run)
    assert why in (section.missing or "")
    assert section.plots == ()


def test_large_messages_are_held_to_the_analytic_bytes(tmp_path: Path) -> None:
    records = changed(
        lambda r: (
            {"sent_bytes_per_row": 1e6, "counted_bytes_per_row": 1.02e6}
            if r.head == "dense_gather" and r.tp_size > 1
            else {}
        )
    )
    notes = " ".join(wire_section(run_of(tmp_path / "run", records)).notes)
    assert "over 512 KiB: the count differs from the analytic bytes by +2.00 % at most" in notes


def test_bytes_that_were_not_counted_are_missing_and_never_zero(tmp_path: Path) -> None:
    records = changed(
        lambda r: {"counted_bytes_per_row": None, "counted_reason": "no interface was seen"}
    )
    section = wire_section(run_of(tmp_path / "run", records))
    assert not {"counted_bytes_per_row", "protocol_bytes_per_row"} & set(section.frame)
    assert any("missing, because no interface was seen" in note for note in section.notes)


def test_wilson_interval_is_that_of_the_literature() -> None:
    """Newcombe, Stat. Med. 17 (1998) 857, table I, method 3: 81 of 263, and 0 of 20."""
    assert wilson_interval(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)


def test_fidelity_shows_the_worst_source(run: Run) -> None:
    (plot,) = fidelity_section(run).plots
    assert any("in code (25 states)" in title for title in marks(plot.svg))


def test_fidelity_that_was_not_measured_is_missing(tmp_path: Path) -> None:
    records = changed(lambda r: {"top1_agreement": None, "num_agreement_states": 0})
    assert "--max-states 0" in (fidelity_section(run_of(tmp_path / "run", records)).missing or "")


def test_crossover_comes_from_the_environment(run: Run) -> None:
    section = crossover_section(run)
    assert list(section.frame.tp_size) == [1, 1, 1, 2, 2, 2]
    assert any("from batch 3 on" in note for note in section.notes)


@pytest.mark.parametrize(
    ("environment", "why"),
    [
        ({}, "the run has no environment.json"),
        ({"heads": ["flashhead"]}, "was not among the heads"),
        ({"heads": ["flashhead_auto"]}, "ended before it wrote"),
    ],
)
def test_a_missing_crossover_has_a_reason(
    tmp_path: Path, environment: dict[str, object], why: str
) -> None:
    section = crossover_section(run_of(tmp_path / "run", environment=environment))
    assert why in (section.missing or "")


def test_damaged_crossovers_are_named_with_their_file(tmp_path: Path) -> None:
    environment = environment_of(golden()) | {"crossovers": {"1": {"changes_at": [3]}}}
    with pytest.raises(UserError, match=r"environment.json is damaged at crossovers"):
        crossover_section(run_of(tmp_path / "run", environment=environment))


def test_a_run_without_pipeline_says_how_to_measure_one(tmp_path: Path) -> None:
    assert "bench_pipeline.py" in (pipeline_section(run_of(tmp_path / "run")).missing or "")


def test_a_damaged_pipeline_file_is_named(tmp_path: Path) -> None:
    document = pipeline_document()
    del document["results"][0]["measured_bubble"]
    with pytest.raises(UserError, match=r"pipeline.json is damaged"):
        pipeline_section(run_of(tmp_path / "run", pipeline=document))


def test_memory_is_held_against_an_even_share(run: Run) -> None:
    frame = memory_section(run).frame
    row = frame[(frame["head"] == "flashhead") & (frame.tp_size == 2)].iloc[0]
    whole = next(r for r in golden() if (r.head, r.tp_size) == ("flashhead", 1))
    assert row.even_share_bytes == whole.weight_bytes_per_rank / 2


def test_the_workspace_is_that_of_the_batch_size_that_needs_most(tmp_path: Path) -> None:
    assert "workspace_bytes_per_rank" not in memory_section(run_of(tmp_path / "cpu")).frame
    records = changed(lambda r: {"workspace_bytes_per_rank": 1_000 * r.batch_size})
    section = memory_section(run_of(tmp_path / "cuda", records))
    assert set(section.frame["workspace_bytes_per_rank"]) == {4_000}
    assert "Workspace" in " ".join(section.notes)


def test_warnings_name_what_a_reader_must_know_first(tmp_path: Path) -> None:
    records = changed(lambda r: {"synthetic": True, "commit": "abc-dirty"})
    said = " ".join(warnings_of(run_of(tmp_path / "run", records)))
    assert "SYNTHETIC" in said
    assert "OVERSUBSCRIBED at tp 8 (8 ranks on 2 cores)" in said
    assert "changes that no commit holds" in said


def test_what_the_ranks_stand_on_is_told_with_reasons(tmp_path: Path) -> None:
    choice = {"name": "key_exchange", "value": "gloo", "reason": "gloo serves the CPU"}
    environment = {"topology": {"drawing": "1 host of 3 ranks", "choices": [choice]}}
    run = run_of(tmp_path / "run", environment=environment)
    assert standing_of(run) == ["1 host of 3 ranks", "key exchange: gloo serves the CPU"]
    assert standing_of(run_of(tmp_path / "older")) == []


def test_facts_that_differ_between_runs_are_marked(tmp_path: Path) -> None:
    one = run_of(tmp_path / "one")
    two = run_of(tmp_path / "two", changed(lambda r: {"commit": "0123456789"}))
    frame = setting_frame([one, two]).set_index("fact")
    assert frame.differs["commit"]
    assert not frame.differs["model"]
