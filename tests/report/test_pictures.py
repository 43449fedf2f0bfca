"""Pictures of a run's folder from golden records."""

from __future__ import annotations

import builtins
import dataclasses
from pathlib import Path
from typing import Any

import pytest

from flashhead_dist.bench.records import Record, read_records
from flashhead_dist.errors import UserError
from flashhead_dist.report.pictures import bytes_figure, latency_figure, write_plots

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


def legend(figure: Any) -> str:
    return " ".join(text.get_text() for text in figure.legends[0].get_texts())


def texts(figure: Any) -> str:
    return " ".join(text.get_text() for text in figure.texts)


def test_projected_latencies_are_hollow_dashed_and_on_grey(records: list[Record]) -> None:
    figure = latency_figure(records)
    assert len(figure.axes) == 2
    (grey,) = figure.axes[0].patches
    assert 2.2 < grey.get_x() < 7 < 9 < grey.get_x() + grey.get_width()
    drawn = lines(figure.axes[0])
    assert [line for line in drawn if line[0] == "-"] == [("-", False, [1, 2])] * 3
    assert [line for line in drawn if line[0] == "--"] == [("--", False, [2, 8])] * 3
    assert [line for line in drawn if line[1]] == [("None", True, [8])] * 3
    assert "PROJECTED" in legend(figure)
    measured = latency_figure([record for record in records if record.measured])
    assert "PROJECTED" not in legend(measured)
    assert not measured.axes[0].patches
    assert {line[0] for line in lines(measured.axes[0])} == {"-", ":"}


def test_measured_latencies_carry_their_spread(records: list[Record]) -> None:
    bars = latency_figure(records).axes[0].collections
    ends = [sorted(y for _, y in bar) for collection in bars for bar in collection.get_segments()]
    batch = [r for r in records if r.batch_size == 1 and r.measured]
    assert sorted(ends) == sorted([r.p10_us, r.p90_us] for r in batch)


def test_ideal_scaling_divides_the_dense_baseline(records: list[Record]) -> None:
    (ideal,) = (x for x in latency_figure(records).axes[0].get_lines() if x.get_linestyle() == ":")
    (alone,) = (
        r.median_us
        for r in records
        if (r.head, r.tp_size, r.batch_size) == ("dense_local_max", 1, 1)
    )
    assert alone is not None
    assert list(ideal.get_ydata()) == pytest.approx([alone, alone / 2, alone / 8])


def test_a_size_without_a_known_latency_is_left_out(records: list[Record]) -> None:
    unknown = [r if r.measured else dataclasses.replace(r, median_us=None) for r in records]
    figure = latency_figure(unknown)
    assert {line[0] for line in lines(figure.axes[0])} == {"-", ":"}
    assert "Left out" in texts(figure)


def byte_points(figure: Any) -> tuple[set[tuple[int, float]], set[tuple[int, float]]]:
    """(tp_size, bytes) of the filled points and of the rings in the first panel."""
    axes = figure.axes[0]
    sizes = [int(label.get_text()) for label in axes.get_xticklabels()]
    filled: set[tuple[int, float]] = set()
    rings: set[tuple[int, float]] = set()
    for line in axes.get_lines():
        if line.get_marker() == "None":
            continue
        ring = line.get_markerfacecolor() == "none"
        for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True):
            (rings if ring else filled).add((sizes[round(x)], y))
    return filled, rings


def test_counted_and_analytic_bytes_are_both_drawn(records: list[Record]) -> None:
    filled, rings = byte_points(bytes_figure(records))
    sending = [r for r in records if r.batch_size == 1 and r.tp_size > 1]
    assert filled == {(r.tp_size, r.counted_bytes_per_row) for r in sending}
    assert rings == {(r.tp_size, r.sent_bytes_per_row) for r in sending}


def test_heads_that_send_the_same_do_not_hide_each_other(records: list[Record]) -> None:
    points = [line for line in bytes_figure(records).axes[0].get_lines() if len(line.get_xdata())]
    rings = [line for line in points if line.get_markerfacecolor() == "none"]
    assert len({line.get_xdata()[0] for line in rings}) == 3


def test_bytes_that_were_not_counted_are_not_drawn(records: list[Record]) -> None:
    uncounted = [dataclasses.replace(record, counted_bytes_per_row=None) for record in records]
    filled, rings = byte_points(bytes_figure(uncounted))
    assert filled == set()
    assert len(rings) == 4


def test_many_batch_sizes_wrap_into_rows(records: list[Record]) -> None:
    many = [
        dataclasses.replace(r, batch_size=r.batch_size + 8 * i) for r in records for i in (0, 1, 2)
    ]
    figure = latency_figure(many)
    assert [axes.get_title() for axes in figure.axes] == [
        f"batch {size}" for size in (1, 4, 9, 12, 17, 20)
    ]
    assert len({round(axes.get_subplotspec().colspan.start) for axes in figure.axes}) == 4


def test_pictures_say_where_they_come_from(records: list[Record]) -> None:
    for figure in (latency_figure(records), bytes_figure(records)):
        assert f"commit {records[0].commit}" in texts(figure)
        assert records[0].device in texts(figure)
        assert records[0].model in figure.get_suptitle()


def test_legend_keeps_clear_of_panels_and_title(records: list[Record]) -> None:
    for number in (1, 4):
        some = [
            dataclasses.replace(r, batch_size=size, model="organisation/some-model-7b-instruct")
            for r in records
            for size in range(1, number + 1)
            if r.batch_size == 1
        ]
        for figure in (latency_figure(some), bytes_figure(some)):
            figure.draw_without_rendering()
            (box,) = (legend.get_window_extent() for legend in figure.legends)
            others = [axes.get_window_extent() for axes in figure.axes]
            others += [text.get_window_extent() for text in figure.texts]
            assert not any(box.overlaps(other) for other in others)


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
