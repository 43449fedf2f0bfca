"""The page as a document: whole, self-contained, with measured and projected figures apart."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest

from flashhead_dist.report.comparison import compare_runs
from flashhead_dist.report.page import FRAME_NAMES, Report, make_report
from flashhead_dist.report.runs import load_runs
from flashhead_dist.report.sections.compared import comparison_section
from flashhead_dist.report.tables_html import table_views
from tests.report.made_up import changed, faster, pipeline_document, run_of, write_run

pytest.importorskip("matplotlib")
VOID = {"meta", "link", "br", "img", "input", "path", "use", "line", "rect"}


class Reader(HTMLParser):
    """Checks that elements nest, and keeps ids, names and what is referred to."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.names: set[str] = set()
        self.targets: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self._keep(tag, attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._keep(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def _keep(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            elif name in ("href", "src", "xlink:href"):
                self.targets.append(value or "")


def read(report: Report) -> Reader:
    reader = Reader()
    reader.feed(report.html)
    assert reader.open == []
    return reader


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Report:
    folder = tmp_path_factory.mktemp("runs") / "run"
    return make_report([run_of(folder, pipeline=pipeline_document())])


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Report:
    folder = tmp_path_factory.mktemp("runs")
    records = [record for record in faster(0.5, "flashhead") if record.batch_size == 1]
    folders = [write_run(folder / "a"), write_run(folder / "b", records)]
    runs = load_runs(folders)
    return make_report(runs, [comparison_section(runs, compare_runs(*runs))])


@pytest.mark.parametrize("name", ["one", "two"])
def test_the_page_needs_nothing_but_itself(name: str, request: pytest.FixtureRequest) -> None:
    report = request.getfixturevalue(name)
    page = read(report)
    assert not page.names & {"script", "iframe", "img", "object", "embed"}
    assert {target for target in page.targets if not target.startswith("#")} == {"data:,"}
    assert "@import" not in report.html
    assert not re.search(r"url\((?!#)", report.html)
    assert len(page.ids) == len(set(page.ids))
    # Every anchor and every reference within a drawing leads somewhere.
    assert {t[1:] for t in page.targets if t.startswith("#")} <= set(page.ids)
    assert set(re.findall(r"url\(#([^)]+)\)", report.html)) <= set(page.ids)


def test_frames_have_names_that_a_later_report_may_replace(one: Report, two: Report) -> None:
    assert {*one.frames, *two.frames} <= FRAME_NAMES
    assert "comparison" in two.frames
    assert "pipeline" in one.frames


def test_every_figure_names_its_run(two: Report) -> None:
    for name, frame in two.frames.items():
        if name != "setting":
            assert set(frame["run"]) <= {"A", "B"}
    assert set(two.frames["latency"]["run"]) == {"A", "B"}


def test_the_frames_of_the_page_are_those_of_the_files(one: Report) -> None:
    assert "4,000" in one.html
    assert 4000.0 in set(one.frames["latency"].measured_median_us)


def test_a_name_from_a_record_is_text_and_no_markup(tmp_path: Path) -> None:
    spoiled = {"model": "<script>alert(1)</script>", "worst_source": "<b>&"}
    records = [r for r in changed(lambda r: spoiled) if (r.tp_size, r.batch_size) == (1, 1)]
    report = make_report([run_of(tmp_path / "run", records)])
    assert "script" not in read(report).names
    assert "&lt;script&gt;" in report.html


def test_the_same_run_gives_the_same_page(tmp_path: Path) -> None:
    """No time of writing and no random id: a page that is kept changes where its run does."""
    records = [r for r in changed(lambda r: {}) if r.head == "flashhead" and r.batch_size == 1]
    run = run_of(tmp_path / "run", records)
    assert make_report([run]).html == make_report([run]).html


def test_tables_keep_projected_rows_apart() -> None:
    frame = pd.DataFrame(
        {
            "head": ["a", "b", "c"],
            "measured_median_us": [1.0, None, None],
            "projected_median_us": [None, 2.0, None],
            "compute_us": [1.0, 1.5, 1.7],
        }
    )
    measured, projected = table_views(frame)
    assert (measured.projected, projected.projected) == (False, True)
    assert [row[0][0] for row in measured.rows] == ["a"]
    assert [row[0][0] for row in projected.rows] == ["b", "c"]
    # What is not known is a dash, never a number.
    assert projected.rows[1][1][0] == "–"


def test_long_tables_start_folded() -> None:
    short = pd.DataFrame({"head": ["a"] * 12})
    (table,) = table_views(short)
    assert table.starts_open(below_plots=False)
    assert not table.starts_open(below_plots=True)
    (table,) = table_views(pd.concat([short, short]))
    assert not table.starts_open(below_plots=False)


def test_changes_beyond_the_noise_have_an_open_table_of_their_own() -> None:
    verdicts = ["same", "worse", "within noise", "better"]
    frame = pd.DataFrame({"head": list("abcd"), "verdict": verdicts})
    marked, every = table_views(frame)
    assert [row[0][0] for row in marked.rows] == ["b", "d"]
    assert marked.classes == ("worse", "better")
    assert marked.starts_open(below_plots=True)
    assert len(every.rows) == 4
    assert not every.starts_open(below_plots=True)
    assert len(table_views(frame[frame.verdict == "same"])) == 1
