"""kernels/bench.py, what it says: verdicts, tables and pictures of made-up measurements."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from rich.console import Console

import bench_report as report
import bench_ways as ways
from bench_cell import Measurement

ENVIRONMENT: dict[str, Any] = {
    "device": "MADE UP H200",
    "driver": "1.2.3",
    "versions": {"torch": "2.13.0", "triton": "3.9.0"},
    "operations": "flashhead_kernels.cuda",
    "commit": "0123456789",
    "time_utc": "2026-01-02T03:04:05+00:00",
    "timing": "CUDA events.",
    "launches": [],
    "complete": True,
}
# microseconds by way; 40 MB at 4,000 GB/s are 10 us, so that flashhead may take 19.
TIMES = {
    ways.FLASHHEAD: 19.0,
    ways.DENSE_FUSED: 80.0,
    ways.DENSE_TORCH: 95.0,
    ways.PUBLISHED_EAGER: 57.0,
}


def a_frame(device: str = "MADE UP H200", **changes: float) -> pd.DataFrame:
    rows = []
    times = {**TIMES, **changes}
    for tp_size in (1, 2):
        for batch_size in (1, 8):
            for way, us in times.items():
                row = Measurement(
                    device=device,
                    model="gemma-3-270m",
                    synthetic=True,
                    vocab_size=262_144,
                    hidden_size=640,
                    tp_size=tp_size,
                    batch_size=batch_size,
                    way=way,
                    timing="CUDA events, graph replay",
                    median_us=us / tp_size,
                    p10_us=us / tp_size - 1,
                    p90_us=us / tp_size + 2,
                    num_iterations=50,
                    steps_per_iteration=8,
                    num_copies=2,
                    read_bytes=40e6 / tp_size,
                    gb_per_s=40e6 / us / 1e3,
                    copy_gb_per_s=4000.0,
                    share_of_copy=40e6 / us / 1e3 / 4000,
                    times_flashhead=us / times[ways.FLASHHEAD],
                    num_checked=4,
                    num_ties=1,
                )
                rows.append(row.as_dict())
    return pd.DataFrame(rows)


def test_verdicts_stand_at_their_limits() -> None:
    kernel, dense, eager = report.verdicts(a_frame())
    assert (
        "flashhead 19.0 us, target at most 1.5 x (40.0 MB / 4,000 GB/s = 10.0 us) + 4 us = 19.0 us"
        in kernel.text
    )
    assert "5.0 times as fast as torch's dense matmul + max, target at least 5" in dense.text
    assert "3.0 times as fast as the eager torch FlashHead, target at least 3" in eager.text
    for verdict in (kernel, dense, eager):
        assert verdict.met is True
        assert verdict.text.startswith("gemma-3-270m, tp 1, batch 1, on MADE UP H200")
        assert verdict.text.endswith(": MET")


@pytest.mark.parametrize(
    ("changes", "missed"),
    [
        ({ways.FLASHHEAD: 19.1, ways.DENSE_TORCH: 200.0, ways.PUBLISHED_EAGER: 100.0}, 0),
        ({ways.DENSE_TORCH: 94.9}, 1),
        ({ways.PUBLISHED_EAGER: 56.9}, 2),
    ],
)
def test_a_verdict_just_past_its_limit_is_missed(changes: dict[str, float], missed: int) -> None:
    verdicts = report.verdicts(a_frame(**changes))
    assert [verdict.met for verdict in verdicts] == [place != missed for place in range(3)]
    assert verdicts[missed].text.endswith(": MISSED")


def test_another_device_is_not_judged() -> None:
    for verdict in report.verdicts(a_frame("Some CPU")):
        assert verdict.met is None
        assert verdict.text.endswith("not judged, the target is for an H200")
    frame = a_frame()
    assert report.verdicts(frame[frame["tp_size"] == 2]) == []


def test_the_table_names_device_and_one_ranks_work() -> None:
    (table,) = report.make_tables(a_frame())
    console = Console(width=130, file=io.StringIO())
    console.print(table)
    text = " ".join(console.file.getvalue().split())
    assert "gemma-3-270m (262,144 x 640) on MADE UP H200" in text
    assert "ONE rank's work" in text
    assert "SYNTHETIC" in text
    columns = [str(column.header) for column in table.columns]
    assert columns == [
        "tp", "batch", "flashhead us", "p10 to p90", "MB", "GB/s", "of copy", "dense fused",
        "dense torch", "published eager",
    ]  # fmt: skip
    cells = [list(column.cells) for column in table.columns]
    assert [column[0] for column in cells] == [
        "1", "1", "19.0", "18.0 to 21.0", "40.0", "2,105", "53%", "4.21", "5.00", "3.00",
    ]  # fmt: skip


def test_files_hold_all_rows_and_say_what_they_stand_on(tmp_path: Path) -> None:
    frame = a_frame()
    report.write_files(frame, ENVIRONMENT, ["a note"], tmp_path)
    again = pd.read_csv(tmp_path / report.CSV_NAME)
    assert list(again.columns) == list(Measurement.__dataclass_fields__)
    assert len(again) == 16
    assert again["median_us"].tolist() == frame["median_us"].tolist()
    page = (tmp_path / report.MARKDOWN_NAME).read_text()
    assert page.startswith("# Head kernels on MADE UP H200\n")
    assert "INCOMPLETE" not in page
    assert "- a note\n" in page
    lines = [line for line in page.splitlines() if line.startswith("| ")]
    assert len(lines) == 1 + 4
    assert {line.count("|") for line in lines} == {12}
    assert page.splitlines()[-5].count("|") == 12  # the rule below the head
    for part in ("1.2.3", "2.13.0", "3.9.0", "0123456789", "2026-01-02", "ONE rank's work"):
        assert part in page


def test_a_run_cut_short_says_so(tmp_path: Path) -> None:
    page = report.markdown(a_frame(), {**ENVIRONMENT, "complete": False}, [])
    assert "INCOMPLETE: the run ended before all cells were measured." in page


def test_a_way_missing_in_some_cells_leaves_a_blank() -> None:
    frame = a_frame(**{ways.PUBLISHED_GRAPH: 38.0})
    there = (frame["way"] != ways.PUBLISHED_GRAPH) | (frame["batch_size"] == 1)
    lines = [line for line in report.markdown(frame[there], ENVIRONMENT, []).splitlines() if line]
    assert lines[-4].endswith("| 3.00 | 2.00 |")
    assert lines[-3].endswith("| 3.00 |  |")


def test_the_picture_is_drawn_with_its_marks(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    kept: list[Figure] = []
    with pytest.MonkeyPatch.context() as patch:
        saved = Figure.savefig
        patch.setattr(
            Figure, "savefig", lambda self, *a, **k: (kept.append(self), saved(self, *a, **k))
        )
        report.draw(a_frame(), "a note", tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    (figure,) = kept
    assert "MADE UP H200" in figure.get_suptitle()
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["gemma-3-270m, one rank of tp 1", "gemma-3-270m, one rank of tp 2"]
    # Four ways and the floor, of which the last is bytes over bandwidth: 10 us, 5 us at tp 2.
    for axes, floor in zip(figure.axes, (10.0, 5.0), strict=True):
        assert len(axes.lines) == 5
        assert axes.lines[-1].get_ydata().tolist() == pytest.approx([floor, floor])


def test_the_page_says_what_was_chosen_between_one_launch_and_two() -> None:
    head = {"hidden_size": 640, "clusters": 512}
    choice = {"groups": 128, "batch": 8, "head": head, "one_us": 9.26, "two_us": 8.0, "launches": 2}
    by_rule = {**choice, "one_us": None, "two_us": None, "launches": 1}
    page = report.markdown(a_frame(), {**ENVIRONMENT, "launches": [by_rule, choice]}, [])
    assert page.rstrip().endswith("|\n| 640 | 128 | 512 | 8 | 9.3 | 8.0 | 2 |")
    assert "One launch or two" not in report.markdown(a_frame(), ENVIRONMENT, [])
