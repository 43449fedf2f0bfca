"""How near each head comes to the memory's roofline: bytes that it must read, over its time."""

from __future__ import annotations

from flashhead_dist.bench.records import Record
from flashhead_dist.report.chart import Chart
from flashhead_dist.report.plot_frame import style_of
from flashhead_dist.report.plots import projected_ground, side_by_side, size_axis
from flashhead_dist.report.runs import Run
from flashhead_dist.report.section import Plot, Section, frame_of

KEY = "roofline"


def roofline_section(run: Run) -> Section:
    """Share of the memory bandwidth that the same ranks reached in a plain read, in this run."""
    methods = dict.fromkeys(record.memory_bandwidth_method for record in run.records)
    notes = [
        "Bytes that the rank that computes longest must read in a step, over its compute time, as "
        "a share of the bandwidth that it reached when it only read. Over 100 %: bytes that came "
        "from a cache.",
        *(f"Bandwidth: {method}." for method in methods),
    ]
    if any(not record.measured for record in run.records):
        notes.append("On grey: compute of a rank alone, so that ranks do not share the memory.")
    return Section(
        key=KEY,
        title="Share of the memory's roofline",
        notes=tuple(notes),
        frame=frame_of([_row(record) for record in run.records]),
        plots=tuple(_plot(run, batch_size) for batch_size in run.batch_sizes),
        legend=tuple(run.heads),
    )


def longest_rank(record: Record) -> int:
    """The rank whose median compute is the longest."""
    return max(range(record.tp_size), key=record.compute_us_by_rank.__getitem__)


def read_bytes_per_s(record: Record) -> float:
    """What the rank that computes longest reads a second of its compute."""
    rank = longest_rank(record)
    return record.read_bytes_by_rank[rank] / (record.compute_us_by_rank[rank] * 1e-6)


def _row(record: Record) -> dict[str, object]:
    rank = longest_rank(record)
    return {
        "batch_size": record.batch_size,
        "tp_size": record.tp_size,
        "head": record.head,
        "read_bytes": record.read_bytes_by_rank[rank],
        "read_bytes_per_s": read_bytes_per_s(record),
        "memory_bandwidth_bytes_per_s": record.memory_bandwidth_bytes_per_s_by_rank[rank],
        "roofline_share": record.roofline_share,
    }


def _plot(run: Run, batch_size: int) -> Plot:
    chart = Chart(f"{KEY}-{run.letter}-b{batch_size}", f"Share of roofline, batch {batch_size}")
    batch = [record for record in run.records if record.batch_size == batch_size]
    projected_ground(chart.axes, batch, "ranks alone")
    for position, head in enumerate(run.heads):
        mine = sorted((r for r in batch if r.head == head), key=lambda record: record.tp_size)
        shift = side_by_side(position, len(run.heads))
        for record in mine:
            words = (
                f"{head}, tp {record.tp_size}: {100 * record.roofline_share:.0f} %, "
                f"{read_bytes_per_s(record) / 1e9:.1f} GB/s"
            )
            style = style_of(head) | {"linestyle": "none"}
            chart.point(record.tp_size * shift, 100 * record.roofline_share, words, **style)
        chart.axes.plot(
            [record.tp_size * shift for record in mine],
            [100 * record.roofline_share for record in mine],
            color=style_of(head)["color"],
            linewidth=0.9,
            alpha=0.6,
        )
    chart.axes.axhline(100, color="#6B7280", linestyle=":", linewidth=1.2)
    # Room for the word above what is not measured together.
    chart.axes.set_ylim(0, max(120.0, 1.15 * max(100 * r.roofline_share for r in batch)))
    size_axis(chart.axes, sorted({record.tp_size for record in batch}))
    chart.axes.set_xlabel("tp_size (ranks)")
    chart.axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0f} %")
    return chart.plot()
