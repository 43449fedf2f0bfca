"""Strong scaling: the same vocabulary over more ranks, each head against itself on one rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from flashhead_dist.bench.records import Record
from flashhead_dist.report.chart import Chart
from flashhead_dist.report.plot_frame import style_of
from flashhead_dist.report.plots import projected_ground, side_by_side, size_axis
from flashhead_dist.report.runs import Run
from flashhead_dist.report.section import Plot, Section, frame_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KEY = "scaling"
_IDEAL: dict[str, Any] = {"color": "#6B7280", "linestyle": ":", "linewidth": 1.2, "zorder": 1}


def scaling_section(run: Run) -> Section:
    """Speedup t(1) / t(P) and efficiency t(1) / (P t(P)), with the ideal lines P and 1."""
    rows = [_row(run, record) for record in run.records if _alone_us(run, record)]
    rows = [row for row in rows if row]
    sizes = sorted({record.tp_size for record in run.records})
    missing = None
    if len(sizes) < 2:
        missing = f"one tp_size was measured ({sizes[0]}): scaling needs two or more"
    elif sizes[0] != 1 or not rows:
        missing = "nothing was measured at tp 1, which speedups refer to"
    if missing:
        return Section(key=KEY, title="Strong scaling", missing=missing)
    plots = [
        plot
        for draw in (_speedup_plot, _efficiency_plot)
        for plot in (draw(run, rows, batch_size) for batch_size in run.batch_sizes)
    ]
    notes = ["Each head against its own median at tp 1. Bars: p10 to p90 of its step at that size."]
    if any(not record.measured for record in run.records):
        notes.append("Hollow, on grey: PROJECTED, as of the latencies.")
    return Section(
        key=KEY,
        title="Strong scaling",
        notes=tuple(notes),
        frame=frame_of(rows),
        plots=tuple(plots),
        legend=tuple(run.heads),
        marks=((":", "ideal"),),
    )


def _alone_us(run: Run, record: Record) -> float | None:
    alone = run.find(record.head, 1, record.batch_size)
    return alone.median_us if alone and alone.measured else None


def _row(run: Run, record: Record) -> dict[str, object]:
    alone_us = _alone_us(run, record)
    if not alone_us or not record.median_us:
        return {}
    kind = "measured" if record.measured else "projected"
    speedup = alone_us / record.median_us
    row: dict[str, object] = {
        "batch_size": record.batch_size,
        "tp_size": record.tp_size,
        "head": record.head,
        "measured_speedup": None,
        "measured_speedup_p10": alone_us / record.p90_us if record.p90_us else None,
        "measured_speedup_p90": alone_us / record.p10_us if record.p10_us else None,
        "measured_scaling_efficiency": None,
    }
    return row | {
        f"{kind}_speedup": speedup,
        f"{kind}_scaling_efficiency": speedup / record.tp_size,
    }


def _speedup_plot(run: Run, rows: Sequence[dict[str, object]], batch_size: int) -> Plot:
    chart = Chart(f"speedup-{run.letter}-b{batch_size}", f"Speedup over tp 1, batch {batch_size}")
    sizes = _prepare(chart.axes, run, batch_size)
    chart.axes.plot(sizes, sizes, **_IDEAL)
    _draw(chart, run, rows, batch_size, over=1.0)
    chart.axes.set_yscale("log", base=2)
    chart.axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}×")
    chart.axes.yaxis.minorticks_off()
    return chart.plot("speedup")


def _efficiency_plot(run: Run, rows: Sequence[dict[str, object]], batch_size: int) -> Plot:
    chart = Chart(f"efficiency-{run.letter}-b{batch_size}", f"Efficiency, batch {batch_size}")
    _prepare(chart.axes, run, batch_size)
    chart.axes.axhline(1.0, **_IDEAL)
    _draw(chart, run, rows, batch_size, over=None)
    chart.axes.set_ylim(bottom=0)
    chart.axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    return chart.plot("efficiency")


def _prepare(axes: Axes, run: Run, batch_size: int) -> list[int]:
    batch = [record for record in run.records if record.batch_size == batch_size]
    sizes = sorted({record.tp_size for record in batch})
    projected_ground(axes, batch)
    size_axis(axes, sizes)
    axes.set_xlabel("tp_size (ranks)")
    return sizes


def _draw(
    chart: Chart,
    run: Run,
    rows: Sequence[dict[str, object]],
    batch_size: int,
    *,
    over: float | None,
) -> None:
    """Points and bars of all heads; speedups divided by `over`, or by each point's own ranks."""
    heads = run.heads
    for position, head in enumerate(heads):
        style, shift = style_of(head), side_by_side(position, len(heads))
        line: list[tuple[float, float]] = []
        for row in rows:
            if (row["head"], row["batch_size"]) != (head, batch_size):
                continue
            tp_size = int(str(row["tp_size"]))
            divisor = over or float(tp_size)
            measured = row["measured_speedup"] is not None
            speedup = _number(row["measured_speedup" if measured else "projected_speedup"])
            x, y = tp_size * shift, speedup / divisor
            line.append((x, y))
            face = {} if measured else {"markerfacecolor": "white"}
            shown = f"{speedup:.2f} times tp 1, efficiency {100 * speedup / tp_size:.0f} %"
            kind = "" if measured else " (PROJECTED)"
            chart.point(
                x, y, f"{head}, tp {tp_size}: {shown}{kind}", **style | face | {"linestyle": "none"}
            )
            if measured and row["measured_speedup_p10"] is not None and tp_size > 1:
                low, high = (_number(row[f"measured_speedup_{end}"]) for end in ("p10", "p90"))
                chart.axes.vlines(x, low / divisor, high / divisor, color=style["color"], lw=0.9)
        xs, ys = [x for x, _ in line], [y for _, y in line]
        chart.axes.plot(xs, ys, color=style["color"], linewidth=0.9, alpha=0.6, zorder=1.5)


def _number(value: object) -> float:
    assert isinstance(value, float)
    return value
