"""Every later run against the first, with the changes beyond the noise marked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from statistics import median

import pandas as pd

from flashhead_dist.report.chart import Chart
from flashhead_dist.report.comparison import (
    Change,
    differences,
    summary,
)
from flashhead_dist.report.plot_frame import style_of
from flashhead_dist.report.runs import Run
from flashhead_dist.report.section import Plot, Section

KEY = "comparison"
_LEAST_WIDTH, _MOST_WIDTH = 0.1, 1.0
"""Shares that a plot shows at least, and that bars of noise may widen it to."""


def comparison_section(runs: Sequence[Run], changes: Sequence[Change]) -> Section:
    """A plot a run and batch size of the latencies' change, and all changes as a frame."""
    baseline, *others = runs
    notes = [
        f"Change of a median from {baseline.letter}, with the noise as a bar around it: half the "
        f"width from p10 to p90 of both runs' iterations, in quadrature. Filled: beyond the noise. "
        f"Two runs also differ by what the machine did meanwhile, which no iteration of one run "
        f"shows."
    ]
    for run in others:
        mine = [change for change in changes if change.run == run.letter]
        found = differences(baseline, run)
        what = "; ".join(found) if found else "nothing recorded, so that all change is noise"
        notes.append(f"{run.letter} differs from {baseline.letter} in {what}.")
        notes += [f"{run.letter}: {sentence}" for sentence in summary(mine)]
        notes += _drift(run, mine)
    frame = pd.DataFrame([asdict(change) for change in changes])
    if frame.empty:
        return Section(
            key=KEY,
            title="Comparison of runs",
            notes=tuple(notes),
            missing="the runs share no head at the same tp_size and batch size",
        )
    plots = [
        plot
        for run in others
        for batch_size in run.batch_sizes
        if (plot := _plot(baseline, run, changes, batch_size)) is not None
    ]
    return Section(
        key=KEY,
        title="Comparison of runs",
        notes=tuple(notes),
        frame=frame[["run", "figure", *(n for n in frame if n not in ("run", "figure"))]],
        plots=tuple(plots),
        legend=tuple(baseline.heads),
        marks=(("o", "beyond the noise"), ("h", "within the noise")),
    )


def _drift(run: Run, changes: Sequence[Change]) -> list[str]:
    """How much all heads changed together: heads of one run are interleaved and drift together."""
    shares = [change.change for change in changes if change.figure == "median_us"]
    heads = {change.head for change in changes if change.figure == "median_us"}
    if len(heads) < 3:
        return []
    return [
        f"{run.letter}: over all {len(heads)} heads and {len(shares)} cells the median change of "
        f"latency is {100 * median(shares):+.1f} %; what all heads share is the machine's more "
        f"likely than the code's."
    ]


def noise_bar(change: Change) -> tuple[float, float]:
    """The shares between which a change may lie, as far above as below it on a logarithm."""
    ratio, factor = 1 + change.change, 1 + change.noise
    return ratio / factor - 1, ratio * factor - 1


def _plot(baseline: Run, run: Run, changes: Sequence[Change], batch_size: int) -> Plot | None:
    mine = [
        change
        for change in changes
        if (change.run, change.figure, change.batch_size) == (run.letter, "median_us", batch_size)
    ]
    if not mine:
        return None
    mine.sort(key=lambda change: (change.tp_size, baseline.heads.index(change.head)))
    chart = Chart(
        f"{KEY}-{run.letter}-b{batch_size}",
        f"Latency, {run.letter} against {baseline.letter}, batch {batch_size}",
        height_px=80 + 18 * len(mine),
    )
    for place, change in enumerate(mine):
        style = style_of(change.head) | {"linestyle": "none"}
        beyond = change.verdict in ("better", "worse")
        face = {} if beyond else {"markerfacecolor": "white"}
        share, noise = 100 * change.change, 100 * change.noise
        low, high = noise_bar(change)
        chart.axes.hlines(place, 100 * low, 100 * high, color=style["color"], linewidth=1.0)
        words = (
            f"{change.head}, tp {change.tp_size}: {change.before:,.0f} to {change.after:,.0f} µs, "
            f"{share:+.1f} %, noise {noise:.1f} %: {change.verdict}"
        )
        chart.point(share, place, words, **style | face)
    # A bar may be longer than the plot: one iteration in ten that took ten times as long does that.
    furthest = 1.3 * max(abs(change.change) for change in mine)
    most = max(_LEAST_WIDTH, furthest, min(_MOST_WIDTH, max(noise_bar(c)[1] for c in mine)))
    least = min(noise_bar(c)[0] for c in mine)
    chart.axes.set_xlim(100 * max(least, -most) - 2, 100 * most + 2)
    chart.axes.axvline(0, color="#6B7280", linewidth=0.8, zorder=1)
    labels = [f"{change.head}, tp {change.tp_size}" for change in mine]
    chart.axes.set_yticks(range(len(mine)), labels)
    chart.axes.set_ylim(len(mine) - 0.5, -0.5)
    chart.axes.grid(visible=True, axis="x")
    chart.axes.xaxis.set_major_formatter(lambda value, _: f"{value:+.0f} %")
    return chart.plot()
