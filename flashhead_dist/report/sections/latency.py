"""What a step takes, by head, `tp_size` and batch size."""

from __future__ import annotations

from flashhead_dist.bench.records import Record
from flashhead_dist.report.chart import Chart
from flashhead_dist.report.plot_frame import heads_of
from flashhead_dist.report.plots import draw_latency, side_by_side
from flashhead_dist.report.runs import Run
from flashhead_dist.report.section import Plot, Section, frame_of

KEY = "latency"
_BOTH_KINDS = ("median_us", "communication_us", "speedup_over_dense_local_max")


def latency_section(run: Run) -> Section:
    """A plot a batch size; measured and projected latencies in columns of their own."""
    notes = ["A step lasts as long as its slowest rank: median over iterations, bars p10 to p90."]
    projected = any(not record.measured for record in run.records)
    if projected:
        notes.append(
            "Hollow, dashed and on grey: PROJECTED, the slowest rank's compute measured alone plus "
            "a model of the exchange, since the ranks do not fit this machine."
        )
    if any(record.median_us is None for record in run.records):
        notes.append("Left out of the plots: sizes whose communication is not known.")
    marks = [("o-", "measured"), (":", "ideal: dense_local_max at tp 1, over tp")]
    if projected:
        marks.insert(1, ("h--", "PROJECTED"))
    return Section(
        key=KEY,
        title="Latency of a step",
        notes=tuple(notes),
        frame=frame_of([_row(record) for record in run.records]),
        plots=tuple(_plot(run, batch_size) for batch_size in run.batch_sizes),
        legend=tuple(run.heads),
        marks=tuple(marks),
    )


def _row(record: Record) -> dict[str, object]:
    kind = "measured" if record.measured else "projected"
    row: dict[str, object] = {
        "batch_size": record.batch_size,
        "tp_size": record.tp_size,
        "head": record.head,
        "measured_median_us": None,
        "measured_p10_us": record.p10_us,
        "measured_p90_us": record.p90_us,
    }
    row |= {f"{kind}_{name}": getattr(record, name) for name in _BOTH_KINDS}
    return row | {
        "compute_us": record.compute_us,
        "wall_median_us": None if record.measured else record.wall_median_us,
        "num_iterations": record.num_iterations,
    }


def _plot(run: Run, batch_size: int) -> Plot:
    batch = [record for record in run.records if record.batch_size == batch_size]
    chart = Chart(f"{KEY}-{run.letter}-b{batch_size}", f"Latency, batch {batch_size}")
    heads = heads_of(run.records)
    draw_latency(chart.axes, batch, heads)
    # Room for the word above what is projected.
    chart.axes.set_ylim(top=1.35 * chart.axes.get_ylim()[1])
    chart.axes.set_xlabel("tp_size (ranks)")
    chart.axes.set_ylabel("µs a step")
    for record in batch:
        if record.median_us is not None:
            shift = side_by_side(heads.index(record.head), len(heads))
            words = f"{record.head}, tp {record.tp_size}: {record.median_us:,.0f} µs"
            chart.spot(
                record.tp_size * (shift if record.measured else 1.0),
                record.median_us,
                words + ("" if record.measured else " (PROJECTED)"),
            )
    return chart.plot()
