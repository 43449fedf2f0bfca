"""What a step of each head would cost on a system that one may not have, without any run.

    python launch/cost.py --list
    python launch/cost.py --system h100-infiniband --shape 262144,640
    python launch/cost.py --system lab.yaml --index DIR --tp-sizes 1,8,64 --batch-size 16
    python launch/cost.py --system l40-ethernet --sources         where each figure comes from

Nothing is measured: bytes over bandwidth, launches, collectives by their steps, from the figures of
the system (docs/concepts/cost-model.md says what is left out and how far it is off). --shape V,D
stands for an index as it is built by default; --index takes one that was built. To project from a
run of your own, see launch/report.py --project.

Exit codes: 0, 2 for a mistake in what was given.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from flashhead_dist.errors import UserError
from flashhead_dist.heads.base import HeadShape
from flashhead_dist.heads.registry import HEADS, check_head_names, head_cost
from flashhead_dist.index import load_manifest
from flashhead_dist.report.projection import cost_table, sources_table, systems_table
from flashhead_dist.report.tables import report_console
from flashhead_topology.cost import StepCost
from flashhead_topology.systems import System, SystemFileError, list_systems, load_system
from rank_parser import integers

_DEFAULT_HEADS = "dense_gather,dense_local_max,flashhead"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        return _cost(arguments)
    except (UserError, SystemFileError) as error:
        print(f"error: {error}", file=sys.stderr)
        return UserError.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--list", action="store_true", help="list the shipped systems")
    parser.add_argument("--system", metavar="NAME", help="a shipped system, or a .yaml file")
    parser.add_argument("--sources", action="store_true", help="list the system's figures")
    parser.add_argument("--shape", type=integers, default=[262_144, 640], metavar="V,D")
    parser.add_argument("--index", type=Path, metavar="DIR", help="an index, in place of --shape")
    parser.add_argument("--heads", default=_DEFAULT_HEADS, help=f"of {', '.join(HEADS)}")
    parser.add_argument("--tp-sizes", type=integers, default=[1, 2, 4, 8, 16, 64], metavar="N,N")
    parser.add_argument("--pp-size", type=int, default=1, metavar="N", help="pipeline stages")
    parser.add_argument("--batch-size", type=int, default=1, metavar="N")
    parser.add_argument("--json", action="store_true", help="one JSON document as the last line")
    return parser


def _cost(arguments: argparse.Namespace) -> int:
    console = report_console()
    if arguments.list:
        console.print(systems_table([load_system(name) for name in list_systems()]))
        return 0
    if arguments.system is None:
        raise UserError("no system is given: name one with --system, or see --list")
    system = load_system(arguments.system)
    if arguments.sources:
        console.print(sources_table(system))
        return 0
    costs = _costs(arguments, system, _shape(arguments))
    console.print(cost_table(system, costs, arguments.batch_size, arguments.pp_size))
    if arguments.json:
        rows = [
            {"head": head, "tp_size": tp_size, **asdict(cost)}
            for (head, tp_size), cost in costs.items()
        ]
        print(json.dumps({"system": system.name, "projected": True, "costs": rows}))
    return 0


def _shape(arguments: argparse.Namespace) -> HeadShape:
    if arguments.index is None:
        if len(arguments.shape) != 2 or min(arguments.shape) < 1:
            given = ",".join(map(str, arguments.shape))
            raise UserError(f"--shape {given} is no vocabulary and hidden size: give V,D")
        return HeadShape.with_default_index(*arguments.shape)
    return HeadShape.of_index(load_manifest(arguments.index))


def _costs(
    arguments: argparse.Namespace, system: System, shape: HeadShape
) -> dict[tuple[str, int], StepCost]:
    heads = arguments.heads.split(",")
    check_head_names(heads)
    try:
        return {
            (head, tp_size): head_cost(
                head,
                shape,
                system,
                tp_size=tp_size,
                pp_size=arguments.pp_size,
                batch_size=arguments.batch_size,
            )
            for head in heads
            for tp_size in arguments.tp_sizes
        }
    except ValueError as error:
        raise UserError(str(error)) from error


if __name__ == "__main__":
    sys.exit(main())
