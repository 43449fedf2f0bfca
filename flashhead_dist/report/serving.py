"""A run of launch/serve_bench.py as a table, as sentences, as JSON, and as a page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich.table import Table

from flashhead_dist.bench.records import ENVIRONMENT_NAME
from flashhead_dist.errors import UserError
from flashhead_dist.report.figures import Chart, Section, line, require_matplotlib, size_axis
from flashhead_dist.report.page import REPORT_FOLDER, Report, make_report, render_page, write_output
from flashhead_dist.report.runs import load_run
from flashhead_dist.report.tables import rich_table
from flashhead_dist.serving.bench import DENSE, FLASHHEAD
from flashhead_dist.serving.records import SERVING_NAME, ServingRecord, read_serving, summarise

_COLORS = {"dense": "#D55E00", "flashhead": "#0072B2"}
_FIGURES = {
    "tokens_per_s": "tokens a second",
    "tpot_p50_ms": "TPOT, ms (median)",
    "ttft_p50_ms": "TTFT, ms (median)",
}
_NOT_IN_TABLE = ["dense_repeats", "flashhead_steps", "rounds", "requests"]


def write_page(run_folder: Path) -> Path:
    """Write the report of one run of either kind to `report` within it; returns the page's path.

    Raises:
        UserError: see `load_run`, `serving_report` and `write_output`.
    """
    serving = is_serving_run(run_folder)
    report = serving_report(run_folder) if serving else make_report([load_run(run_folder)])
    return write_output(report, run_folder / REPORT_FOLDER)[0]


def is_serving_run(folder: Path) -> bool:
    """Whether launch/serve_bench.py wrote the folder."""
    return (folder / SERVING_NAME).is_file()


def serving_table(summary: pd.DataFrame) -> Table:
    """A line a `tp_size`, concurrency and head; see `flashhead_dist.serving.records`."""
    return rich_table(
        "vLLM's server by head: measured", summary.drop(columns=_NOT_IN_TABLE, errors="ignore")
    )


def serving_notes(summary: pd.DataFrame) -> list[str]:
    """Sentences under the table: how it was measured, and how far greedy texts repeat."""
    notes = [
        "tokens/s: median over rounds, with p10 and p90. TTFT and TPOT: of vLLM's benchmark "
        "client, percentiles over requests, median over rounds. The heads take turns; meanwhile "
        "the other server is frozen.",
        "Same texts: requests whose text is the dense server's of the same round. Same start: mean "
        "share of that text before the first difference.",
    ]
    for row in serving_document(summary):
        where = f"tp {row['tp_size']}, concurrency {row['concurrency']}"
        if row["head"] == DENSE and row["dense_repeats"] is not None:
            notes.append(
                f"{where}: {100 * row['dense_repeats']:.0f} % of the dense server's texts equal "
                f"those of its first call at the lowest concurrency."
            )
        if row["head"] == FLASHHEAD and row["flashhead_steps"] not in (None, 1.0):
            share = 100 * row["flashhead_steps"]
            notes.append(f"{where}: FlashHead computed {share:.1f} % of the steps.")
    return notes


def serving_sentences(summary: pd.DataFrame) -> list[str]:
    """One sentence a cell, the lowest `tp_size` and concurrency first."""
    texts = []
    for row in serving_document(summary):
        if row["head"] == FLASHHEAD and row["over_dense"] is not None:
            same = row["identical_texts"]
            texts.append(
                f"tp {row['tp_size']}, concurrency {row['concurrency']}: flashhead gives "
                f"{row['tokens_per_s']:.1f} tokens a second, {row['over_dense']:.2f} times the "
                f"dense head's; "
                f"{'no' if same is None else f'{100 * same:.0f} % of the'} texts are the same."
            )
    return texts


def serving_document(summary: pd.DataFrame) -> list[dict[str, Any]]:
    """What --json prints: the summary's rows; None for no figure."""
    found: list[dict[str, Any]] = json.loads(summary.to_json(orient="records"))
    return found


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
    require_matplotlib()
    summary, first = summarise(records), records[0]
    section = Section(
        key="serving",
        title="Dense and FlashHead under the same load",
        notes=tuple(serving_notes(summary)),
        frame=summary,
        charts=tuple(
            _chart(of_size, int(str(tp_size)), key, place)
            for tp_size, of_size in summary.groupby("tp_size")
            for place, key in enumerate(_FIGURES, start=1)
        ),
        columns=len(_FIGURES),
        legend=tuple((color, head) for head, color in _COLORS.items()),
    )
    facts = pd.Series(_facts(folder, records), name="A").rename_axis("fact").reset_index()
    html = render_page(
        title=f"vLLM with and without FlashHead: {first.model} on {first.system}",
        labels=[f"{first.time_utc[:16].replace('T', ' ')}, {first.system}, {first.commit}"],
        groups=[[(section, "")]],
        setting=facts.assign(differs=False),
        warnings=_warnings(records),
        files=["serving.csv"],
        sentences=serving_sentences(summary) or ["Only one head was measured so far."],
    )
    return Report(html=html, frames={"serving": summary})


def _warnings(records: Sequence[ServingRecord]) -> list[str]:
    warnings = []
    if over := sorted({record.tp_size for record in records if record.oversubscribed}):
        warnings.append(
            f"OVERSUBSCRIBED at tp {', '.join(map(str, over))}: ranks shared cores there, so its "
            f"times do not apply to machines with enough of them."
        )
    if records[0].commit.endswith("-dirty"):
        warnings.append(f"Commit {records[0].commit}: the code had uncommitted changes.")
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
            arguments: Any = json.loads(path.read_text(encoding="utf-8"))["arguments"]
            facts["arguments"] = ", ".join(f"{name} {value}" for name, value in arguments.items())
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"cannot read {path} ({error!r}): restore or remove it") from error
    return facts


def _chart(summary: pd.DataFrame, tp_size: int, key: str, place: int) -> str:
    name = _FIGURES[key]
    name_of = f"serving-{key.replace('_', '-')}-tp{tp_size}"
    chart = Chart(name_of, f"{name}, tp {tp_size}", (place, len(_FIGURES)))
    for head, own in summary.groupby("head", sort=False):
        look = {"color": _COLORS[str(head)], "marker": "s" if head == DENSE else "o"}
        text = f"{head}, concurrency {{}}: {{:,.1f}} {name}"
        line(chart, own["concurrency"], own[key], text, **look)
    chart.axes.set_ylim(bottom=0)
    size_axis(chart.axes, sorted(summary["concurrency"].unique()))
    chart.axes.set_xlabel("requests at once")
    return chart.html()
