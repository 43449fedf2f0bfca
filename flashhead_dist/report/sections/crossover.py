"""From which batch size on a scan of the shard beats retrieval, as the run measured it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flashhead_dist.bench.crossover import Crossover, crossover_notes
from flashhead_dist.bench.records import ENVIRONMENT_NAME
from flashhead_dist.errors import UserError
from flashhead_dist.heads.dense import DenseLocalMax
from flashhead_dist.heads.flashhead import FlashHead, FlashHeadAuto
from flashhead_dist.report.chart import Chart
from flashhead_dist.report.plot_frame import style_of
from flashhead_dist.report.plots import plain_numbers, size_axis
from flashhead_dist.report.runs import Run
from flashhead_dist.report.section import Plot, Section, frame_of

KEY = "crossover"
_TITLE = "Batch crossover"
_WAYS = {"retrieval": FlashHead.name, "scan": DenseLocalMax.name}


def crossover_section(run: Run) -> Section:
    """Retrieval against a scan of the index's own rows by batch size, a plot a `tp_size`.

    Raises:
        UserError: `environment.json` holds crossovers that are none.
    """
    if not run.environment:
        return Section(key=KEY, title=_TITLE, missing=f"the run has no {ENVIRONMENT_NAME}")
    crossovers = _crossovers(run)
    if not crossovers:
        missing = "flashhead_auto, which looks for it, was not among the heads that were measured"
        if FlashHeadAuto.name in run.environment.get("heads", []):
            missing = "the run ended before it wrote its crossovers"
        return Section(key=KEY, title=_TITLE, missing=missing)
    rows = [
        {
            "tp_size": tp_size,
            "batch_size": batch_size,
            "retrieval_us": retrieval_us,
            "scan_us": scan_us,
            "scan_over_retrieval": scan_us / retrieval_us,
        }
        for tp_size, crossover in crossovers.items()
        for batch_size, (retrieval_us, scan_us) in sorted(crossover.times_us.items())
    ]
    return Section(
        key=KEY,
        title=_TITLE,
        notes=(
            "Compute of the slowest rank, median of 7 rounds: both ways take the same exchange. "
            "A step into the shaded part would scan.",
            *crossover_notes(crossovers, run.records),
        ),
        frame=frame_of(rows),
        plots=tuple(_plot(run, tp_size, crossover) for tp_size, crossover in crossovers.items()),
        marks=((FlashHead.name, "retrieval"), (DenseLocalMax.name, "scan of the shard's rows")),
    )


def _crossovers(run: Run) -> dict[int, Crossover]:
    found: Mapping[str, Any] = run.environment.get("crossovers") or {}
    try:
        crossovers = {int(size): Crossover.from_json(value) for size, value in found.items()}
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(
            f"{run.folder / ENVIRONMENT_NAME} is damaged at crossovers ({error!r}): restore it, "
            f"or remove it and go without what it says"
        ) from error
    return {size: crossovers[size] for size in sorted(crossovers)}


def _plot(run: Run, tp_size: int, crossover: Crossover) -> Plot:
    chart = Chart(f"{KEY}-{run.letter}-tp{tp_size}", f"Retrieval or scan, tp {tp_size}")
    sizes = sorted(crossover.times_us)
    for way, (name, head) in enumerate(_WAYS.items()):
        style = style_of(head)
        times = [crossover.times_us[size][way] for size in sizes]
        chart.axes.plot(sizes, times, color=style["color"], linewidth=1.2)
        for size, us in zip(sizes, times, strict=True):
            words = f"{name}, batch {size}: {us:,.0f} µs"
            chart.point(size, us, words, **style | {"linestyle": "none"})
    changes = crossover.changes_at
    for start, end in zip(changes[::2], (*changes[1::2], sizes[-1] * 2**0.4), strict=False):
        chart.axes.axvspan(start, end, color="#F3F4F6", zorder=0)
    chart.axes.set_yscale("log")
    plain_numbers(chart.axes)
    size_axis(chart.axes, [size for size in sizes if size & (size - 1) == 0 or size == sizes[-1]])
    chart.axes.set_xlabel("batch size (rows)")
    chart.axes.set_ylabel("µs of compute")
    return chart.plot()
