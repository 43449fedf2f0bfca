"""The page as a document, and its files: written as a whole or not at all."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest

from flashhead_dist.errors import UserError
from flashhead_dist.report.comparison import compare_runs, comparison_section
from flashhead_dist.report.page import (
    FRAME_NAMES,
    GENERATOR,
    Report,
    check_output,
    make_report,
    write_output,
)
from flashhead_dist.report.runs import load_runs
from tests.report.run_folders import changed, faster, pipeline_document, run_of, write_run

pytest.importorskip("matplotlib")
REFERENCE = Path(__file__).parents[2] / "docs" / "reference_run"
VOID = {"meta", "link", "br", "img", "input", "path", "use", "line", "rect"}


class Reader(HTMLParser):
    """Checks that elements nest, and collects ids, element names and references."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.names: list[str] = []
        self.targets: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.handle_startendtag(tag, attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.targets += [v or "" for name, v in attrs if name in ("href", "src", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
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
    runs = load_runs([write_run(folder / "a"), write_run(folder / "b", records)])
    return make_report(runs, [comparison_section(runs, compare_runs(*runs))])


@pytest.mark.parametrize("name", ["one", "two"])
def test_the_page_needs_nothing_but_itself(name: str, request: pytest.FixtureRequest) -> None:
    html = request.getfixturevalue(name).html
    page = read(html)
    assert not {*page.names} & {"script", "iframe", "img", "object", "embed"}
    assert {target for target in page.targets if not target.startswith("#")} == {"data:,"}
    assert "@import" not in html
    assert not re.search(r"url\((?!#)", html)
    assert len(page.ids) == len(set(page.ids))
    # Every anchor and every reference within a drawing leads somewhere.
    assert {t[1:] for t in page.targets if t.startswith("#")} <= set(page.ids)
    assert set(re.findall(r"url\(#([^)]+)\)", html)) <= set(page.ids)


def test_the_page_opens_with_the_short_table_and_one_chart(one: Report) -> None:
    start = one.html[: one.html.index('<section id="latency">')]
    assert "<td>2,150 (9.4×)</td>".replace("<td>", "") in start
    assert 'class=" projected">1,550 (3.9×)</td>' in start
    assert start.index('class="short"') < start.index("<figure")
    assert start.count("<figure") == 1


def test_every_figure_names_its_run(one: Report, two: Report) -> None:
    assert {*one.frames, *two.frames} <= FRAME_NAMES
    assert {"pipeline", "latency"} <= set(one.frames)
    assert set(two.frames["latency"]["run"]) == {"A", "B"}
    assert set(two.frames["comparison"]["run"]) == {"B"}


def test_the_reference_run_opens_with_the_figures_that_are_stored() -> None:
    frames = make_report(load_runs([REFERENCE])).frames
    for name in ("latency", "scaling", "split", "wire", "roofline", "fidelity", "memory"):
        stored = pd.read_csv(REFERENCE / "report" / f"{name}.csv")
        keys = [key for key in ("batch_size", "tp_size", "head") if key in stored]
        made = frames[name][list(stored)].sort_values(keys).reset_index(drop=True)
        stored = stored.sort_values(keys).reset_index(drop=True)
        pd.testing.assert_frame_equal(made, stored, check_dtype=False, rtol=1e-12)


def test_a_name_from_a_record_is_text_and_no_markup(tmp_path: Path) -> None:
    spoiled = {"model": "<script>alert(1)</script>", "worst_source": "<b>&"}
    records = [r for r in changed(lambda r: spoiled) if (r.tp_size, r.batch_size) == (1, 1)]
    html = make_report([run_of(tmp_path / "run", records)]).html
    assert "script" not in read(html).names
    assert "&lt;script&gt;" in html


def test_the_same_run_gives_the_same_page(tmp_path: Path) -> None:
    """No time of writing and no random id: a stored page changes only if its run does."""
    records = [r for r in changed(lambda r: {}) if r.head == "flashhead" and r.batch_size == 1]
    run = run_of(tmp_path / "run", records)
    assert make_report([run]).html == make_report([run]).html


def test_the_hardware_topology_is_listed_with_reasons(tmp_path: Path) -> None:
    choice = {"name": "key_exchange", "value": "gloo", "reason": "gloo serves the CPU"}
    environment = {"topology": {"drawing": "1 host of 3 ranks", "choices": [choice]}}
    records = [r for r in changed(lambda r: {}) if (r.tp_size, r.batch_size) == (1, 1)]
    html = make_report([run_of(tmp_path / "run", records, environment=environment)]).html
    assert "key exchange: gloo serves the CPU" in html


PAGE = f'<!doctype html><meta name="generator" content="{GENERATOR}">'
FRAME = pd.DataFrame({"head": ["flashhead"], "median_us": [1.5]})
REPORT = Report(html=PAGE, frames={"latency": FRAME, "wire": FRAME})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_report_is_a_page_and_its_figures(tmp_path: Path) -> None:
    paths = write_output(REPORT, tmp_path / "deep" / "report")
    assert [path.name for path in paths] == ["report.html", "latency.csv", "wire.csv"]
    assert paths[1].read_text() == "head,median_us\nflashhead,1.5\n"
    assert names(tmp_path / "deep") == ["report"]


def test_an_earlier_report_is_replaced_with_all_its_files(tmp_path: Path) -> None:
    write_output(REPORT, tmp_path / "report")
    write_output(Report(html=PAGE, frames={"memory": FRAME}), tmp_path / "report")
    assert names(tmp_path / "report") == ["memory.csv", "report.html"]
    assert names(tmp_path) == ["report"]


@pytest.mark.parametrize("name", ["records.jsonl", "notes.csv", "latency.csv", "report.html"])
def test_files_that_no_report_wrote_are_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=f"holds {name}, which no report wrote"):
        write_output(REPORT, tmp_path)
    assert names(tmp_path) == [name]
    assert (tmp_path / name).read_text() == "mine"


def test_a_file_beside_an_earlier_report_is_not_lost(tmp_path: Path) -> None:
    write_output(REPORT, tmp_path / "report")
    (tmp_path / "report" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"notes\.txt"):
        write_output(REPORT, tmp_path / "report")
    assert (tmp_path / "report" / "notes.txt").read_text() == "mine"


def test_a_file_cannot_be_the_folder(tmp_path: Path) -> None:
    (tmp_path / "report").write_text("mine")
    with pytest.raises(UserError, match="is a file"):
        check_output(tmp_path / "report")


def test_a_report_that_cannot_be_written_leaves_the_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_output(REPORT, tmp_path / "report")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_csv", full)
    with pytest.raises(UserError, match="No space left on device"):
        write_output(Report(html=PAGE + "new", frames={"wire": FRAME}), tmp_path / "report")
    assert names(tmp_path) == ["report"]
    assert names(tmp_path / "report") == ["latency.csv", "report.html", "wire.csv"]
    assert (tmp_path / "report" / "report.html").read_text() == PAGE
