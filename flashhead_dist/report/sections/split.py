"""Where the time of a step goes: centroids, candidates, the rest, exchange; and others' waiting."""

from __future__ import annotations

from collections.abc import Sequence

from flashhead_dist.bench.records import Record
from flashhead_dist.bench.split import COMPUTE_PARTS
from flashhead_dist.report.chart import Chart
from flashhead_dist.report.plot_frame import PROJECTED_GROUND
from flashhead_dist.report.runs import Run
from flashhead_dist.report.section import Plot, Section, frame_of

KEY = "split"
PART_COLORS = {
    "centroids": "#56B4E9",
    "candidates": "#0072B2",
    "other": "#9CA3AF",
    "exchange": "#D55E00",
    "waiting": "#F0E442",
}
PART_WORDS = {
    "centroids": "centroid scores and choice of clusters",
    "candidates": "rows scored exactly",
    "other": "everything else",
    "exchange": "exchange, the wire's own time",
    "waiting": "longest waiting of another rank (not on the path)",
}
_PATH = (*COMPUTE_PARTS, "exchange")


def split_section(run: Run) -> Section:
    """Shares of a step along the rank that computes longest, a plot a batch size and `tp_size`."""
    methods = dict.fromkeys(record.split.method for record in run.records)
    notes = [
        "Along the rank that computes longest. Waiting is idle time of the others and no part of "
        "that rank's step: the thin bar below, of the same scale.",
        *(f"How: {method}." for method in methods),
    ]
    if any(not record.measured for record in run.records):
        notes.append("On grey: ranks that share cores; the exchange between them is not measured.")
    return Section(
        key=KEY,
        title="Where the time of a step goes",
        notes=tuple(notes),
        frame=frame_of([_row(record) for record in run.records]),
        plots=tuple(
            _plot(run, [r for r in run.records if (r.batch_size, r.tp_size) == (batch, tp)])
            for batch in run.batch_sizes
            for tp in run.tp_sizes
            if any((r.batch_size, r.tp_size) == (batch, tp) for r in run.records)
        ),
        marks=tuple((f"color:{PART_COLORS[part]}", words) for part, words in PART_WORDS.items()),
    )


def _row(record: Record) -> dict[str, object]:
    parts = record.split.step_us
    row: dict[str, object] = {
        "batch_size": record.batch_size,
        "tp_size": record.tp_size,
        "head": record.head,
    }
    for name in ("step", *_PATH):
        row[f"{name}_us"] = part_us(record, name)
    for name in ("p10", "p90"):
        exchange = parts["exchange"]
        row[f"exchange_{name}_us"] = None if exchange is None else getattr(exchange, name)
    kind = "measured" if record.measured else "projected"
    return row | {f"{kind}_waiting_us": part_us(record, "waiting")}


def part_us(record: Record, part: str) -> float | None:
    """The median of a part along the slowest rank, or None where it was not measured."""
    found = record.split.step_us[part]
    return None if found is None else found.median


def _plot(run: Run, records: Sequence[Record]) -> Plot:
    first = records[0]
    key = f"{KEY}-{run.letter}-b{first.batch_size}-tp{first.tp_size}"
    words = f"Step, tp {first.tp_size}, batch {first.batch_size}"
    chart = Chart(key, words, height_px=62 + 27 * len(records))
    axes = chart.axes
    if not first.measured:
        axes.set_facecolor(PROJECTED_GROUND)
    for place, record in enumerate(records):
        parts = {name: part_us(record, name) for name in (*_PATH, "waiting")}
        whole = sum(parts[name] or 0.0 for name in _PATH)
        left = 0.0
        for name in _PATH:
            us = parts[name]
            if not us or not whole:
                continue
            shown = f"{record.head}: {name} {us:,.0f} µs, {100 * us / whole:.0f} %"
            bar = axes.barh(place, us / whole, 0.5, left, color=PART_COLORS[name], linewidth=0)
            chart.mark(list(bar), shown)
            left += us / whole
        waiting = parts["waiting"]
        if waiting and whole:
            shown = f"{record.head}: another rank waits {waiting:,.0f} µs"
            width = min(waiting / whole, 1.0)
            bar = axes.barh(place + 0.36, width, 0.16, color=PART_COLORS["waiting"], linewidth=0)
            chart.mark(list(bar), shown + ("" if record.measured else " (PROJECTED)"))
        axes.text(1.02, place, f"{whole:,.0f} µs", va="center", fontsize=7.5)
    axes.set_yticks(range(len(records)), [record.head for record in records])
    axes.set_ylim(len(records) - 0.4, -0.5)
    axes.set_xlim(0, 1.22)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1.0])
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    axes.grid(visible=False, axis="y")
    return chart.plot(f"batch {first.batch_size}")
