"""The report of runs: one HTML file without network or scripts, and its figures as CSV files.

The page opens with a short table and one chart, then sections; tables are folded below charts.
A report is written as a whole or not at all, and only over an earlier report.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd

from flashhead_dist.errors import UserError
from flashhead_dist.heads.registry import BASELINE, DEFAULT_HEAD
from flashhead_dist.report.columns import column_of
from flashhead_dist.report.figures import Section, legend_svg, require_matplotlib
from flashhead_dist.report.overview import sentences, short_table
from flashhead_dist.report.resource_sections import RESOURCE_SECTIONS
from flashhead_dist.report.runs import RunFolder, setting_frame, warnings_of
from flashhead_dist.report.step_sections import STEP_SECTIONS, latency_chart
from flashhead_dist.report.tables import by_kind

GENERATOR = "flashhead-dist launch/report.py"
PAGE_NAME = "report.html"
REPORT_FOLDER = "report"
FRAME_NAMES = frozenset(
    {
        "setting", "comparison", "latency", "split", "scaling", "ranks", "wire", "roofline",
        "fidelity", "crossover", "memory", "pipeline", "projection", "device_counts", "ranges",
        "kernels", "serving"
    }
)  # fmt: skip
"""Stems of all CSV files that a report may hold."""


@dataclass(frozen=True)
class Report:
    """Everything to be written: the page, and the frames behind it by the stem of their file."""

    html: str
    frames: dict[str, pd.DataFrame]


def make_report(runs: Sequence[RunFolder], extra: Sequence[Section] = ()) -> Report:
    """Make the report of one run or more; nothing is written.

    extra: sections that are of no single run: a comparison, a projection.

    Raises:
        UserError: a run holds what a section cannot read, or matplotlib or jinja2 is missing.
    """
    require_matplotlib()
    several = len(runs) > 1
    groups = [[(section, "")] for section in extra]
    frames = {"setting": setting_frame(runs)}
    frames |= {section.key: section.frame for section in extra if len(section.frame)}
    missing: list[str] = []
    for make in (*STEP_SECTIONS, *RESOURCE_SECTIONS):
        made = [(make(run), run) for run in runs]
        found = [(section, run) for section, run in made if not section.missing]
        groups.append([(section, run.label if several else "") for section, run in found])
        missing += [
            f"{f'{run.letter}, ' if several else ''}{section.title}: {section.missing}."
            for section, run in made
            if section.missing
        ]
        if with_figures := [(s, run) for s, run in found if len(s.frame)]:
            frame = pd.concat(s.frame.assign(run=run.letter) for s, run in with_figures)
            frame = frame[["run", *frame.columns.drop("run")]]
            frames[with_figures[0][0].key] = frame.reset_index(drop=True)
    models = " and ".join(dict.fromkeys(run.first.model for run in runs))
    systems = " and ".join(dict.fromkeys(run.first.system for run in runs))
    html = render_page(
        title=f"Output heads of {models} on {systems}",
        labels=[run.label for run in runs],
        overviews=[_overview(run, run.label if several else "") for run in runs],
        warnings=[
            f"{f'{run.letter}: ' if several else ''}{warning}"
            for run in runs
            for warning in warnings_of(run)
        ],
        groups=[group for group in groups if group],
        missing=missing,
        setting=frames["setting"],
        hardware=[line for run in runs for line in _hardware(run)],
        files=[f"{name}.csv" for name in frames],
    )
    return Report(html=html, frames=frames)


def _overview(run: RunFolder, heading: str) -> dict[str, Any]:
    """The page's first part: table, chart and sentences of the smallest batch size."""
    first, *others = run.batch_sizes
    product = DEFAULT_HEAD if DEFAULT_HEAD in run.heads else run.heads[0]
    folded = [(product, size) for size in others]
    folded += [(BASELINE, first)] if BASELINE in run.heads and product != BASELINE else []
    return {
        "heading": heading,
        "batch_size": first,
        "table": short_table(run.frame, first),
        "chart": latency_chart(run, first, f"overview-{run.letter}"),
        "heads": run.heads,
        "letter": run.letter,
        "sentences": sentences(run.frame, first, product),
        "folded": [
            (f"{head} at batch {size}", sentences(run.frame, size, head)) for head, size in folded
        ],
        "others": [(size, short_table(run.frame, size)) for size in others],
    }


def _hardware(run: RunFolder) -> list[str]:
    """Hardware topology and what was chosen for it; empty where the run does not hold it."""
    topology = run.environment.get("topology")
    if not isinstance(topology, Mapping):
        return []
    choices = topology.get("choices", [])
    lines = [topology.get("drawing", "")]
    lines += [f"{choice['name'].replace('_', ' ')}: {choice['reason']}" for choice in choices]
    return [str(line) for line in lines if line]


def render_page(
    *,
    title: str,
    labels: Sequence[str],
    groups: Sequence[Sequence[tuple[Section, str]]],
    setting: pd.DataFrame,
    warnings: Sequence[str],
    files: Sequence[str],
    **more: Any,
) -> str:
    """The page's HTML.

    groups: of sections of the same key, each with the label of its run where there are several.
    more: `overviews`, `missing`, `hardware`, `sentences`; see page.html.j2.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    # Keeps a number and its unit on one line.
    environment.filters["tight"] = lambda text: re.sub(
        r"(?<=\d) (?=(?:µs|%|MB|GB/s|KiB)\b|%)", "\N{NO-BREAK SPACE}", text
    )
    environment.globals |= {"column_of": column_of, "by_kind": by_kind, "legend_svg": legend_svg}
    values = {"overviews": [], "sentences": [], "missing": [], "hardware": []} | more
    return environment.from_string(_read("page.html.j2")).render(
        title=title, labels=labels, groups=groups, setting=setting, warnings=warnings, files=files,
        generator=GENERATOR, css=_read("page.css"), **values
    )  # fmt: skip


def _read(name: str) -> str:
    return files("flashhead_dist.report").joinpath(name).read_text(encoding="utf-8")


def check_output(folder: Path) -> None:
    """Refuse a folder that cannot be one of a report, before anything is computed.

    Raises:
        UserError: it is a file, or holds files that no report wrote.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"--output {folder} is a file: give a folder, new or of an earlier report")
    others = sorted(path.name for path in folder.iterdir() if not _is_of_report(path))
    if others:
        raise UserError(
            f"--output {folder} holds {others[0]}, which no report wrote: nothing is overwritten "
            f"there, so give a new folder"
        )


def write_output(report: Report, folder: Path) -> list[Path]:
    """Write page and CSV files beside the folder, then move them to it; returns their paths.

    An earlier report there is replaced as a whole, so that no file of it is left among the new.

    Raises:
        UserError: see `check_output`, or the disk refuses; an earlier report is left as it was.
    """
    check_output(folder)
    fresh: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        (fresh / PAGE_NAME).write_text(report.html, encoding="utf-8")
        for stem, frame in report.frames.items():
            frame.to_csv(fresh / f"{stem}.csv", index=False)
        fresh.chmod(0o755)
        if folder.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
            folder.replace(old)
            fresh.replace(folder)
            shutil.rmtree(old)
        else:
            fresh.replace(folder)
    except OSError as error:
        if fresh is not None:
            shutil.rmtree(fresh, ignore_errors=True)
        raise UserError(
            f"cannot write the report to {folder} ({error.strerror or error}): free space or give "
            f"another folder with --output"
        ) from error
    return [folder / name for name in (PAGE_NAME, *_csv_names(report.frames))]


def _csv_names(stems: Iterable[str]) -> list[str]:
    return [f"{stem}.csv" for stem in stems]


def _is_of_report(path: Path) -> bool:
    if path.suffix == ".csv" and path.stem in FRAME_NAMES:
        return (path.parent / PAGE_NAME).is_file()
    if path.name != PAGE_NAME:
        return False
    try:
        with path.open(encoding="utf-8") as file:
            return f'name="generator" content="{GENERATOR}"' in file.read(2000)
    except (OSError, UnicodeDecodeError):
        return False
