"""One or many runs as a page: where the time goes, and what another machine would cost.

    python launch/report.py runs/2026-11-21T14-04-42_cpu-2c_5505d1775f
    python launch/report.py BEFORE AFTER --output comparison         the first is the baseline
    python launch/report.py RUN --project h100-infiniband --tp-sizes 1,8,64
    python launch/report.py RUN --fail-if 'flashhead.top1_agreement<0.995' --fail-if ...

A RUN is a folder that launch/scale.py wrote, or one (alone) that launch/serve_bench.py wrote.
Writes report.html, which needs no network, and the same figures as CSV files to --output (default:
`report` in the last RUN). An earlier report there is replaced; nothing else is, and nothing is
written where a run cannot be read. docs/report.md explains every part of the page, the noise of a
comparison and what --fail-if can ask.

Exit codes: 0; 1 where a condition of --fail-if holds, with the figure on standard error; 2 for a
mistake in what was given.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from flashhead_dist.errors import UserError
from flashhead_dist.report.comparison import (
    check_conditions,
    compare_runs,
    comparison_section,
    parse_condition,
)
from flashhead_dist.report.figures import Section
from flashhead_dist.report.overview import sentences
from flashhead_dist.report.page import REPORT_FOLDER, check_output, make_report, write_output
from flashhead_dist.report.projection import (
    compute_errors,
    head_shape,
    model_error,
    open_system,
    projection_section,
)
from flashhead_dist.report.runs import RunFolder, load_runs
from flashhead_dist.report.serving import is_serving_run, serving_report
from flashhead_topology.systems import list_systems
from rank_parser import integers

_CONDITION_HOLDS = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        return _report(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: RUN/report")
    parser.add_argument(
        "--project",
        action="append",
        default=[],
        metavar="SYSTEM",
        help=f"{', '.join(list_systems())}, or the .yaml file of one; may be given again",
    )
    parser.add_argument(
        "--tp-sizes",
        type=integers,
        metavar="N,N",
        help="of --project (default: powers of 2 up to what SYSTEM joins)",
    )
    parser.add_argument(
        "--measured-on",
        metavar="SYSTEM",
        help="the system of the last RUN, as launch/calibrate.py writes it: the cost model is "
        "held against the run, and its error widens the band of --project",
    )
    parser.add_argument("--fail-if", action="append", default=[], metavar="CONDITION")
    parser.add_argument("--json", action="store_true", help="one JSON document as the last line")
    return parser


def _report(arguments: argparse.Namespace) -> int:
    if any(is_serving_run(path) for path in arguments.runs):
        return _serving(arguments)
    conditions = [parse_condition(text) for text in arguments.fail_if]
    runs = load_runs(arguments.runs)
    output = arguments.output or runs[-1].folder / REPORT_FOLDER
    check_output(output)
    projection = _projection(arguments, runs[-1])
    compared = [compare_runs(runs[0], run) for run in runs[1:]]
    changes = pd.concat(compared, ignore_index=True) if compared else pd.DataFrame()
    extra = [comparison_section(runs, changes)] if compared else []
    report = make_report(runs, [*extra, *projection])
    failures = check_conditions(conditions, runs, changes)
    paths = write_output(report, output)
    for run in runs:
        for sentence in sentences(run.frame, run.batch_sizes[0]):
            print(f"{run.letter}: {sentence}" if compared else sentence)
    for path in paths:
        print(f"wrote {path}")
    for failure in failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    if arguments.json:
        document = {
            "page": str(paths[0]),
            "files": [str(path) for path in paths[1:]],
            "failures": failures,
        }
        print(json.dumps(document))
    return _CONDITION_HOLDS if failures else 0


def _serving(arguments: argparse.Namespace) -> int:
    """The page of one run of launch/serve_bench.py, which nothing else applies to."""
    folder, *others = arguments.runs
    asked = {
        "--project": arguments.project,
        "--tp-sizes": arguments.tp_sizes,
        "--measured-on": arguments.measured_on,
        "--fail-if": arguments.fail_if,
    }
    refused = [flag for flag, value in asked.items() if value]
    if others or refused:
        what = refused[0] if refused else f"{others[0]} beside it"
        raise UserError(
            f"a run of launch/serve_bench.py is shown alone, without {what}: leave that out"
        )
    output = arguments.output or folder / REPORT_FOLDER
    paths = write_output(serving_report(folder), output)
    for path in paths:
        print(f"wrote {path}")
    if arguments.json:
        files = [str(path) for path in paths[1:]]
        print(json.dumps({"page": str(paths[0]), "files": files, "failures": []}))
    return 0


def _projection(arguments: argparse.Namespace, run: RunFolder) -> list[Section]:
    """The section of what `--project` asks for, about one run; none where it asks for nothing."""
    if not arguments.project:
        for name in ("tp_sizes", "measured_on"):
            if getattr(arguments, name) is not None:
                flag = name.replace("_", "-")
                raise UserError(f"--{flag} says how to project: name a system with --project")
        return []
    systems = [open_system(name) for name in dict.fromkeys(arguments.project)]
    shape = head_shape(run)
    errors = pd.Series(dtype=float)
    if arguments.measured_on:
        errors = compute_errors(run, shape, open_system(arguments.measured_on))
    error = model_error(errors, arguments.measured_on)
    return [projection_section(run, shape, systems, arguments.tp_sizes, error)]


if __name__ == "__main__":
    sys.exit(main())
