"""Files of a report: written as a whole or not at all, and only in the place of a report."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from flashhead_dist.errors import UserError
from flashhead_dist.report.page import GENERATOR, Report
from flashhead_dist.report.write import check_output, write_output

PAGE = f'<!doctype html><meta name="generator" content="{GENERATOR}">'
FRAME = pd.DataFrame({"head": ["flashhead"], "median_us": [1.5]})
REPORT = Report(html=PAGE, frames={"latency": FRAME, "wire": FRAME})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_report_is_a_page_and_its_figures(tmp_path: Path) -> None:
    paths = write_output(REPORT, tmp_path / "deep" / "report")
    assert [path.name for path in paths] == ["report.html", "latency.csv", "wire.csv"]
    assert all(path.is_file() for path in paths)
    assert (tmp_path / "deep" / "report" / "latency.csv").read_text() == (
        "head,median_us\nflashhead,1.5\n"
    )
    assert names(tmp_path / "deep") == ["report"]


def test_an_earlier_report_is_replaced_with_all_its_files(tmp_path: Path) -> None:
    write_output(REPORT, tmp_path / "report")
    write_output(Report(html=PAGE, frames={"memory": FRAME}), tmp_path / "report")
    assert names(tmp_path / "report") == ["memory.csv", "report.html"]
    assert names(tmp_path) == ["report"]


@pytest.mark.parametrize("name", ["records.jsonl", "notes.csv", "latency.csv", "report.html"])
def test_what_no_report_wrote_stays_as_it_is(tmp_path: Path, name: str) -> None:
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


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
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
