"""One or many runs as a page: where the time goes, and what another machine would cost.

    python launch/report.py runs/2026-11-21T14-04-42_cpu-2c_5505d1775f
    python launch/report.py BEFORE AFTER --output comparison         the first is the baseline
    python launch/report.py RUN --project h100-infiniband --tp-sizes 1,8,64
    python launch/report.py RUN --fail-if 'flashhead.top1_agreement<0.995' --fail-if ...

A RUN is a folder that launch/scale.py wrote, or one (alone) that launch/serve_bench.py wrote.
Writes report.html, which needs no network, and the same figures as CSV files to --output (default:
`report` in the last RUN). An earlier report there is replaced; nothing else is, and nothing is
written where a run cannot be read. docs/guides/reports.md explains every part of the page, the
noise of a comparison and what --fail-if can ask.

Exit codes: 0; 1 where a condition of --fail-if holds, with the figure on standard error; 2 for a
mistake in what was given.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, UseAppendAction, arg

from flashhead_dist.errors import UserError
from flashhead_dist.report.comparison import (
    check_conditions,
    compare_all,
    comparison_section,
    parse_condition,
)
from flashhead_dist.report.overview import sentences
from flashhead_dist.report.page import (
    REPORT_FOLDER,
    Report,
    check_output,
    make_report,
    write_output,
)
from flashhead_dist.report.projection import project
from flashhead_dist.report.runs import folder_of, load_runs
from flashhead_dist.report.serving import is_serving_run, serving_report
from options import Folder, Integers, JsonOutput, Value, flag_of, parse


@dataclass(kw_only=True)
class Reported:
    """What to report."""

    runs: Positional[Annotated[list[Path], arg(metavar="RUN [RUN ...]")]]
    """folders of runs; the first is the baseline"""
    output: Folder[Path | None] = None
    """default: `report` in the last RUN"""
    fail_if: Annotated[UseAppendAction[list[str]], arg(metavar="CONDITION")] = field(
        default_factory=list
    )
    """exit with 1 where this holds; may be given again"""


@dataclass(kw_only=True)
class Projected:
    """Projection of the last RUN to other systems."""

    project: Annotated[UseAppendAction[list[str]], arg(metavar="SYSTEM")] = field(
        default_factory=list
    )
    """a shipped system (launch/cost.py --list) or the .yaml file of one; may be given again"""
    tp_sizes: Integers[list[int] | None] = None
    """default: powers of 2 up to what SYSTEM joins"""
    measured_on: Value[str | None] = None
    """the system of the last RUN, as launch/calibrate.py writes it: the cost model's error against
    that run widens the band"""


@dataclass(kw_only=True)
class ReportOptions:
    """All options of the script."""

    reported: Reported
    projected: Projected
    output: JsonOutput


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    try:
        return write(parse(ReportOptions, argv, "launch/report.py", __doc__))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def write(options: ReportOptions) -> int:
    """Write the report; returns 1 where a condition of --fail-if holds."""
    runs = options.reported.runs
    output = options.reported.output or folder_of(runs[-1]) / REPORT_FOLDER
    make = of_serving if any(map(is_serving_run, runs)) else of_runs
    report, texts, failures = make(options, output)
    paths = [str(path) for path in write_output(report, output)]
    for line in [*texts, *(f"wrote {path}" for path in paths)]:
        print(line)
    for failure in failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    if options.output.json:
        print(json.dumps({"page": paths[0], "files": paths[1:], "failures": failures}))
    return 1 if failures else 0


def of_runs(options: ReportOptions, output: Path) -> tuple[Report, list[str], list[str]]:
    """The report of runs of launch/scale.py, sentences about them, and failures."""
    conditions = [parse_condition(text) for text in options.reported.fail_if]
    runs = load_runs(options.reported.runs)
    check_output(output)
    changes = compare_all(runs)
    sections = [comparison_section(runs, changes)] if len(runs) > 1 else []
    chosen = options.projected
    if chosen.project:
        sections.append(project(runs[-1], chosen.project, chosen.tp_sizes, chosen.measured_on))
    elif unused := [name for name, value in vars(chosen).items() if value]:
        raise UserError(f"{flag_of(unused[0])} says how to project: name a system with --project")
    report = make_report(runs, sections)
    found = [
        (run.letter, text) for run in runs for text in sentences(run.frame, run.batch_sizes[0])
    ]
    texts = [f"{letter}: {text}" if len(runs) > 1 else text for letter, text in found]
    return report, texts, check_conditions(conditions, runs, changes)


def of_serving(options: ReportOptions, output: Path) -> tuple[Report, list[str], list[str]]:
    """The report of one run of launch/serve_bench.py, to which no other option applies."""
    folder, *others = options.reported.runs
    given = {"fail_if": options.reported.fail_if, **vars(options.projected)}
    refused = [flag_of(name) for name, value in given.items() if value]
    if others or refused:
        what = refused[0] if refused else f"{others[0]} beside it"
        raise UserError(
            f"{folder} or another run is of launch/serve_bench.py, whose report takes one run "
            f"without {what}: leave that out"
        )
    return serving_report(folder), [], []


if __name__ == "__main__":
    sys.exit(main())
