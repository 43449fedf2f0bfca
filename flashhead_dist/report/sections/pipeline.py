"""How long the stages of a pipeline idle, beside what a formula and these stages allow."""

from __future__ import annotations

from typing import Any

from flashhead_dist.bench.records import PIPELINE_NAME
from flashhead_dist.errors import UserError
from flashhead_dist.report.chart import Chart
from flashhead_dist.report.plots import size_axis
from flashhead_dist.report.runs import Run
from flashhead_dist.report.section import Plot, Section, frame_of

KEY = "pipeline"
_TITLE = "Pipeline bubble"
_BUBBLES = ("measured_bubble", "formula_bubble", "ideal_bubble")
_COLUMNS = ("micro_batches", "schedule", "tokens_per_s", *_BUBBLES)
_COLORS = {"continuous": "#0072B2", "flushed": "#D55E00"}


def pipeline_section(run: Run) -> Section:
    """Measured bubbles by micro-batches in flight and schedule.

    Raises:
        UserError: `pipeline.json` is not what launch/bench_pipeline.py writes.
    """
    if run.pipeline is None:
        return Section(
            key=KEY,
            title=_TITLE,
            missing=f"the run folder has no {PIPELINE_NAME}: launch/bench_pipeline.py --run-dir "
            f"FOLDER measures stages and puts it there",
        )
    document = run.pipeline
    try:
        rows: list[dict[str, Any]] = [
            {name: row[name] for name in _COLUMNS} for row in document["results"]
        ]
        plots = (_plot(run, rows),)
        what = _words(document)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(
            f"{run.folder / PIPELINE_NAME} is damaged ({error!r}): write it again with "
            f"launch/bench_pipeline.py --run-dir, or remove it"
        ) from error
    return Section(
        key=KEY,
        title=_TITLE,
        notes=(
            what,
            "Bubble: mean share of its time that a stage is idle. Formula: of equal stages, "
            "(p - 1) / (m + p - 1) where every step is flushed (GPipe, section 2.3). Free "
            "messages: the measured compute of these stages, replayed with messages that take no "
            "time.",
        ),
        frame=frame_of(rows),
        plots=plots,
        marks=(
            ("color:#0072B2", "continuous"),
            ("color:#D55E00", "flushed"),
            ("o", "measured"),
            (":", "equal stages, by formula"),
            ("--", "these stages, free messages"),
        ),
    )


def _words(document: Any) -> str:
    stages = f"{document['pp_size']} stages"
    if document.get("sleep_ms") not in (None, "None"):
        return f"SIMULATED COMPUTE: {stages} that sleep; schedule and messages are real."
    shared = " OVERSUBSCRIBED: stages shared cores, so that the shares mean little."
    model = document.get("model") if document.get("model") not in (None, "None") else "the default"
    return (
        f"{stages} of {model if model != 'the default' else 'the default model'} with the head "
        f"{document['head']}, {document['new_tokens']} tokens a sequence, median of "
        f"{document['repeats']} runs.{shared if document.get('oversubscribed') else ''}"
    )


def _plot(run: Run, rows: list[dict[str, Any]]) -> Plot:
    chart = Chart(f"{KEY}-{run.letter}", "Idle share of the stages")
    for schedule in dict.fromkeys(row["schedule"] for row in rows):
        mine = sorted(
            (row for row in rows if row["schedule"] == schedule), key=lambda r: r["micro_batches"]
        )
        color = _COLORS.get(schedule, "#374151")
        numbers = [row["micro_batches"] for row in mine]
        for name, line in (("formula_bubble", ":"), ("ideal_bubble", "--")):
            values = [100 * row[name] for row in mine]
            chart.axes.plot(numbers, values, line, color=color, linewidth=1.1)
        chart.axes.plot(numbers, [100 * row["measured_bubble"] for row in mine], color=color)
        for row in mine:
            share = 100 * row["measured_bubble"]
            words = f"{schedule}, {row['micro_batches']} micro-batches: idle {share:.1f} %"
            chart.point(row["micro_batches"], share, words, marker="o", color=color, markersize=6)
    size_axis(chart.axes, sorted({row["micro_batches"] for row in rows}))
    chart.axes.set_ylim(bottom=0)
    chart.axes.set_xlabel("micro-batches in flight")
    chart.axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0f} %")
    return chart.plot()
