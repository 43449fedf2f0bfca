"""Plots and the summary file from golden records."""

from __future__ import annotations

import builtins
import dataclasses
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from flashhead_dist.errors import UserError
from flashhead_dist.measure.records import Record, read_records
from flashhead_dist.report.plots import bytes_figure, latency_figure, write_plots
from flashhead_dist.report.present import write_report
from flashhead_dist.report.summary import summary_frame, write_summary

DATA = Path(__file__).parent / "data" / "records.jsonl"
pytest.importorskip("matplotlib")


@pytest.fixture
def records() -> list[Record]:
    return read_records(DATA)


def lines(axes: Any) -> list[tuple[str, bool, list[int]]]:
    """(line style, hollow, x to the nearest size) of every line."""
    return [
        (
            line.get_linestyle(),
            line.get_markerfacecolor() in ("white", "none"),
            [round(x) for x in line.get_xdata()],
        )
        for line in axes.get_lines()
    ]


def texts(figure: Any) -> str:
    return " ".join(text.get_text() for text in figure.texts)


def test_projected_latencies_are_hollow_and_dashed_and_said(records: list[Record]) -> None:
    figure = latency_figure(records)
    assert len(figure.axes) == 2
    drawn = lines(figure.axes[0])
    assert [line for line in drawn if line[0] == "-"] == [("-", False, [1, 2])] * 3
    assert [line for line in drawn if line[0] == "--"] == [("--", False, [2, 8])] * 3
    assert [line for line in drawn if line[1]] == [("None", True, [8])] * 3
    assert "OVERSUBSCRIBED at tp 8 (8 ranks on 2 cores)" in texts(figure)
    assert "PROJECTED" in texts(figure)


def test_measured_latencies_carry_their_spread(records: list[Record]) -> None:
    assert len(latency_figure(records).axes[0].collections) == 3


def test_nothing_is_called_projected_where_all_is_measured(records: list[Record]) -> None:
    measured = [record for record in records if record.measured]
    figure = latency_figure(measured)
    assert "OVERSUBSCRIBED" not in texts(figure)
    assert {line[0] for line in lines(figure.axes[0])} == {"-"}


def test_counted_and_analytic_bytes_are_both_drawn(records: list[Record]) -> None:
    drawn = lines(bytes_figure(records).axes[0])
    assert drawn.count(("-", False, [2, 8])) == 3
    assert drawn.count((":", True, [2, 8])) == 3


def test_heads_that_send_the_same_do_not_hide_each_other(records: list[Record]) -> None:
    starts = [line.get_xdata()[0] for line in bytes_figure(records).axes[0].get_lines()[::2]]
    assert len(set(starts)) == 3


def test_bytes_that_were_not_counted_are_not_drawn(records: list[Record]) -> None:
    uncounted = [dataclasses.replace(record, counted_bytes_per_row=None) for record in records]
    drawn = lines(bytes_figure(uncounted).axes[0])
    assert drawn.count(("-", False, [])) == 3
    assert drawn.count((":", True, [2, 8])) == 3


def test_pictures_are_written_and_bytes_only_where_any_are_sent(
    records: list[Record], tmp_path: Path
) -> None:
    assert [path.name for path in write_plots(records, tmp_path)] == ["latency.png", "bytes.png"]
    alone = [record for record in records if record.tp_size == 1]
    assert [path.name for path in write_plots(alone, tmp_path)] == ["latency.png"]
    assert (tmp_path / "bytes.png").read_bytes().startswith(b"\x89PNG")


def test_missing_matplotlib_is_a_sentence(
    records: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_import = builtins.__import__

    def without(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real_import(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match="--skip-plots"):
        write_plots(records, tmp_path)


def test_summary_keeps_measured_and_projected_apart(records: list[Record]) -> None:
    frame = summary_frame(records)
    assert len(frame) == 18
    eight = frame[frame.tp_size == 8]
    assert eight.measured_median_us.isna().all()
    assert eight.projected_median_us.notna().all()
    others = frame[frame.tp_size != 8]
    assert others.measured_median_us.notna().all()
    assert others.projected_median_us.isna().all()
    assert "median_us" not in frame.columns
    one = frame[(frame["head"] == "flashhead") & (frame.tp_size == 2) & (frame.batch_size == 1)]
    assert one.measured_median_us.item() == pytest.approx(2150)
    assert one.measured_scaling_efficiency.item() == pytest.approx(0.930, abs=1e-3)


def test_summary_file_is_sorted_and_readable(records: list[Record], tmp_path: Path) -> None:
    shuffled = records[::-1]
    written = pd.read_csv(write_summary(shuffled, tmp_path))
    assert written.batch_size.tolist() == sorted(written.batch_size)
    assert written.tp_size.tolist()[:9] == [1] * 3 + [2] * 3 + [8] * 3


def test_report_without_plots_is_the_summary(records: list[Record], tmp_path: Path) -> None:
    assert [path.name for path in write_report(records, tmp_path, plots=False)] == ["summary.csv"]


def test_a_folder_that_is_gone_is_a_sentence(records: list[Record], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--runs-dir"):
        write_report(records, tmp_path / "gone", plots=False)
