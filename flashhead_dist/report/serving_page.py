"""The page of a run of launch/serve_bench.py."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from flashhead_dist.bench.records import ENVIRONMENT_NAME
from flashhead_dist.errors import UserError
from flashhead_dist.report.chart import Chart
from flashhead_dist.report.page import Report, make_page
from flashhead_dist.report.plots import size_axis
from flashhead_dist.report.section import Plot, Section
from flashhead_dist.report.serving import serving_notes, serving_words
from flashhead_dist.serving.bench import DENSE
from flashhead_dist.serving.records import SERVING_NAME, ServingRecord, read_serving, summarise

KEY = "serving"
_COLORS = {"dense": "#D55E00", "flashhead": "#0072B2"}
_FIGURES = (
    ("tokens_per_s", "tokens a second"),
    ("tpot_p50_ms", "TPOT, ms (median)"),
    ("ttft_p50_ms", "TTFT, ms (median)"),
)


def is_serving_run(folder: Path) -> bool:
    """Whether launch/serve_bench.py wrote the folder."""
    return (folder / SERVING_NAME).is_file()


def serving_report(folder: Path) -> Report:
    """Page and figures of one run, finished or not.

    Raises:
        UserError: records are damaged or there are none, or matplotlib or jinja2 is missing.
    """
    records = read_serving(folder)
    if not records:
        raise UserError(
            f"{folder / SERVING_NAME} holds no record, as its run ended before the first was "
            f"measured: run launch/serve_bench.py again"
        )
    summary = summarise(records)
    section = Section(
        key=KEY,
        title="Dense and FlashHead under the same load",
        notes=tuple(serving_notes(summary)),
        frame=summary,
        plots=tuple(_plots(summary)),
        marks=tuple((f"color:{color}", head) for head, color in _COLORS.items()),
    )
    first = records[0]
    return make_page(
        title=f"vLLM with and without FlashHead: {first.model} on {first.system}",
        label=f"{first.time_utc[:16].replace('T', ' ')}, {first.system}, {first.commit}",
        words=serving_words(summary) or ["One head only was measured so far."],
        facts=_facts(folder, records),
        sections=[section],
        warnings=_warnings(records),
    )


def _warnings(records: Sequence[ServingRecord]) -> list[str]:
    warnings = []
    if over := sorted({record.tp_size for record in records if record.oversubscribed}):
        warnings.append(
            f"OVERSUBSCRIBED at tp {', '.join(map(str, over))}: ranks shared cores there, so that "
            f"its times say nothing about machines with enough of them."
        )
    if records[0].commit.endswith("-dirty"):
        warnings.append(f"Commit {records[0].commit}: the code had changes that no commit holds.")
    return warnings


def _facts(folder: Path, records: Sequence[ServingRecord]) -> dict[str, str]:
    first = records[0]
    facts = {
        "run": folder.resolve().name,
        "system": f"{first.system}: {first.device}",
        "model": f"{first.model}, {first.dtype}",
        "weights": first.model_hash[:12],
        "index": first.index_hash[:12],
        "tokens a request": str(first.new_tokens),
        "commit": first.commit,
        "software": ", ".join(f"{name} {number}" for name, number in first.versions.items()),
    }
    path = folder / ENVIRONMENT_NAME
    if path.is_file():
        try:
            environment: Any = json.loads(path.read_text(encoding="utf-8"))
            facts["arguments"] = ", ".join(
                f"{name} {value}" for name, value in environment["arguments"].items()
            )
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(
                f"cannot read {path} ({error!r}): restore it, or remove it and go without"
            ) from error
    return facts


def _plots(summary: pd.DataFrame) -> list[Plot]:
    return [
        _plot(of_size, int(str(tp_size)), name, words)
        for tp_size, of_size in summary.groupby("tp_size")
        for name, words in _FIGURES
    ]


def _plot(summary: pd.DataFrame, tp_size: int, name: str, words: str) -> Plot:
    chart = Chart(f"{KEY}-{name.replace('_', '-')}-tp{tp_size}", f"{words}, tp {tp_size}")
    for head, own in summary.groupby("head", sort=False):
        color = _COLORS[str(head)]
        sizes, values = own["concurrency"].tolist(), own[name].tolist()
        marker = "s" if head == DENSE else "o"
        chart.axes.plot(sizes, values, color=color, linewidth=1.2)
        for size, value in zip(sizes, values, strict=True):
            said = f"{head}, concurrency {size}: {value:,.1f} {words}"
            chart.point(size, value, said, marker=marker, color=color, markersize=6)
    chart.axes.set_ylim(bottom=0)
    size_axis(chart.axes, sorted(summary["concurrency"].unique().tolist()))
    chart.axes.set_xlabel("requests at once")
    return chart.plot(row=f"tp{tp_size}")
