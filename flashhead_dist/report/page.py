"""The page: all parts of the report in one HTML document, without network or scripts."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from itertools import groupby
from typing import Any

import pandas as pd

from flashhead_dist.errors import UserError
from flashhead_dist.report.legend import LegendKey, legend_keys
from flashhead_dist.report.runs import Run
from flashhead_dist.report.section import Plot, Section
from flashhead_dist.report.sections.crossover import crossover_section
from flashhead_dist.report.sections.device_counts import device_counts_section
from flashhead_dist.report.sections.fidelity import fidelity_section
from flashhead_dist.report.sections.latency import latency_section
from flashhead_dist.report.sections.memory import memory_section
from flashhead_dist.report.sections.pipeline import pipeline_section
from flashhead_dist.report.sections.profile import kernels_section, ranges_section
from flashhead_dist.report.sections.ranks import ranks_section
from flashhead_dist.report.sections.roofline import roofline_section
from flashhead_dist.report.sections.scaling import scaling_section
from flashhead_dist.report.sections.setting import KEY as SETTING_KEY
from flashhead_dist.report.sections.setting import setting_frame, standing_of, warnings_of
from flashhead_dist.report.sections.split import split_section
from flashhead_dist.report.sections.wire import wire_section
from flashhead_dist.report.tables_html import TableView, table_views
from flashhead_dist.report.verdict import verdict

GENERATOR = "flashhead-dist launch/report.py"
_SECTIONS: tuple[Callable[[Run], Section], ...] = (
    latency_section,
    split_section,
    scaling_section,
    ranks_section,
    wire_section,
    device_counts_section,
    roofline_section,
    fidelity_section,
    crossover_section,
    memory_section,
    pipeline_section,
    ranges_section,
    kernels_section,
)

FRAME_NAMES = frozenset(
    {
        "setting", "comparison", "latency", "split", "scaling", "ranks", "wire", "roofline",
        "fidelity", "crossover", "memory", "pipeline", "projection",
        "device_counts", "ranges", "kernels", "serving",
    }
)  # fmt: skip
"""Stems of all files of figures that a report may hold."""


@dataclass(frozen=True)
class Report:
    """Everything to be written: the page, and the frames behind it by the stem of their file."""

    html: str
    frames: dict[str, pd.DataFrame]


@dataclass(frozen=True)
class _Block:
    """A section of one run; the heading names the run where there are several."""

    section: Section
    heading: str = ""
    keys: tuple[LegendKey, ...] = ()
    tables: tuple[TableView, ...] = ()
    projected: bool = False

    @property
    def rows(self) -> list[list[Plot]]:
        """Plots that stand side by side."""
        return [list(plots) for _, plots in groupby(self.section.plots, key=lambda plot: plot.row)]


@dataclass(frozen=True)
class _Fact:
    name: str
    values: tuple[str, ...]
    differs: bool


@dataclass(frozen=True)
class _Paragraph:
    """Its text, and what it is about, where it says so before a colon."""

    lead: str
    text: str

    @classmethod
    def of(cls, front: str, text: str) -> _Paragraph:
        """Of a sentence `lead: text`; front: put before the lead."""
        lead, colon, rest = text.partition(": ")
        return cls(f"{front}{lead}", rest) if colon else cls("", f"{front}{text}")


@dataclass(frozen=True)
class _Part:
    """An entry of the page's contents."""

    key: str
    title: str
    paragraphs: tuple[_Paragraph, ...] = ()
    more: tuple[_Paragraph, ...] = ()
    facts: tuple[_Fact, ...] | None = None
    standing: tuple[str, ...] = ()
    blocks: tuple[_Block, ...] = field(default=())


def make_report(runs: Sequence[Run], extra: Sequence[Section] = ()) -> Report:
    """Make the report of one run or more; nothing is written.

    extra: sections that are of no single run: a comparison, a projection.

    Raises:
        UserError: a run holds what a section cannot read, or matplotlib or jinja2 is missing.
    """
    _require_libraries()
    parts = [_words_part(runs)]
    frames: dict[str, pd.DataFrame] = {SETTING_KEY: setting_frame(runs)}
    for section in extra:
        frames |= {section.key: section.frame} if not section.frame.empty else {}
    parts += [_extra_part(section) for section in extra if section.key != "projection"]
    parts.append(_setting_part(runs))
    for make in _SECTIONS:
        sections = [make(run) for run in runs]
        parts.append(_part(sections, runs))
        found = [
            section.frame.assign(run=run.letter)
            for section, run in zip(sections, runs, strict=True)
            if not section.frame.empty
        ]
        if found:
            frame = pd.concat(found, ignore_index=True)
            frames[sections[0].key] = frame[["run", *(n for n in frame if n != "run")]]
    parts += [_extra_part(section) for section in extra if section.key == "projection"]
    warnings = [
        f"{run.letter}: {warning}" if len(runs) > 1 else warning
        for run in runs
        for warning in warnings_of(run)
    ]
    html = _render(
        title=_title(runs),
        runs=runs,
        parts=parts,
        warnings=warnings,
        files=[f"{name}.csv" for name in frames],
        generator=GENERATOR,
        css=_read("page.css"),
    )
    return Report(html=html, frames=frames)


def make_page(
    *,
    title: str,
    label: str,
    words: Sequence[str],
    facts: Mapping[str, str],
    sections: Sequence[Section],
    warnings: Sequence[str],
) -> Report:
    """The page of one run of another kind than launch/scale.py's; nothing is written.

    words: sentences to begin with. facts: what was measured on what.

    Raises:
        UserError: matplotlib or jinja2 is missing.
    """
    _require_libraries()
    known = tuple(_Fact(name, (value,), differs=False) for name, value in facts.items())
    parts = [
        _Part("words", "In words", paragraphs=tuple(_Paragraph.of("", text) for text in words)),
        *map(_extra_part, sections),
        _Part(SETTING_KEY, "What was measured on what", facts=known),
    ]
    frames = {section.key: section.frame for section in sections}
    html = _render(
        title=title,
        runs=[{"label": label}],
        parts=parts,
        warnings=warnings,
        files=[f"{name}.csv" for name in frames],
        generator=GENERATOR,
        css=_read("page.css"),
    )
    return Report(html=html, frames=frames)


def _title(runs: Sequence[Run]) -> str:
    models = " and ".join(dict.fromkeys(run.first.model for run in runs))
    systems = " and ".join(dict.fromkeys(run.first.system for run in runs))
    return f"What the output head costs: {models} on {systems}"


def _words_part(runs: Sequence[Run]) -> _Part:
    first: list[_Paragraph] = []
    more: list[_Paragraph] = []
    for run in runs:
        found = verdict(run) or ["Neither flashhead nor dense_local_max was measured on one rank."]
        front = f"{run.letter}, " if len(runs) > 1 else ""
        paragraphs = [_Paragraph.of(front, text) for text in found]
        first.append(paragraphs[0])
        more += paragraphs[1:]
    return _Part("words", "In words", paragraphs=tuple(first), more=tuple(more))


def _setting_part(runs: Sequence[Run]) -> _Part:
    facts = [
        _Fact(str(row["fact"]), tuple(str(row[run.letter]) for run in runs), bool(row["differs"]))
        for row in setting_frame(runs).to_dict("records")
    ]
    standing = [
        f"{run.letter}, {line}" if len(runs) > 1 else line
        for run in runs
        for line in standing_of(run)
    ]
    return _Part(
        SETTING_KEY, "What was measured on what", facts=tuple(facts), standing=tuple(standing)
    )


def _part(sections: Sequence[Section], runs: Sequence[Run]) -> _Part:
    blocks = [
        _Block(
            section=section,
            heading=run.label if len(runs) > 1 else "",
            keys=tuple(legend_keys(section, run.letter)),
            tables=tuple(table_views(section.frame)),
        )
        for section, run in zip(sections, runs, strict=True)
    ]
    return _Part(sections[0].key, sections[0].title, blocks=tuple(blocks))


def _extra_part(section: Section) -> _Part:
    block = _Block(
        section=section,
        keys=tuple(legend_keys(section, "runs")),
        tables=tuple(table_views(section.frame)),
        projected=section.key == "projection",
    )
    return _Part(section.key, section.title, blocks=(block,))


def _require_libraries() -> None:
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"the report needs {error.name}, which is not installed: run "
            f"pip install 'flashhead-dist[report]'"
        ) from error


def _render(**values: Any) -> str:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["tight"] = _tight
    return environment.from_string(_read("page.html.j2")).render(**values)


def _tight(text: str) -> str:
    """Keeps a number and its unit on one line."""
    return re.sub(r"(?<=\d) (?=(?:µs|%|MB|GB/s|KiB)\b|%)", "\N{NO-BREAK SPACE}", text)


def _read(name: str) -> str:
    return files("flashhead_dist.report").joinpath(name).read_text(encoding="utf-8")
