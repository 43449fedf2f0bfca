"""The command `escalation` of evaluate.py: its options, its run and its table."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rich.console import Console
from rich.table import Table

from flashhead_dist.errors import UserError
from flashhead_dist.evaluate.escalation import escalation_points
from flashhead_dist.evaluate.truth import dense_truth
from flashhead_dist.heads.registry import HeadBuilder
from flashhead_dist.index import ensure_index, load_manifest
from flashhead_dist.index.calibrate import write_escalation
from flashhead_dist.models import open_model
from flashhead_dist.parallel import TensorParallel
from flashhead_dist.states import collect_hidden_states, synthetic_hidden_states

COMMANDS = ("escalation",)
_EVERY = "all"
_SHARES = (0.0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)


def add_commands(commands: Any) -> None:
    """Add the command to the subparsers of evaluate.py."""
    parser = commands.add_parser(
        "escalation",
        help="what flashhead_escalate costs and gains, by its threshold",
        description="Rows whose margin (best candidate's logit less the best unprobed cluster's "
        "score) lies below a threshold take a second round. For each threshold: the share of test "
        "states that do, mean bytes read, and top-1 agreement with the dense head.",
    )
    parser.add_argument("--model", help="HF folder, .gguf file or hub id (default: built in)")
    parser.add_argument("--synthetic", metavar="V,D", help="a made-up embedding, marked as such")
    parser.add_argument("--index", type=Path, metavar="DIR", help="index folder (default: cached)")
    parser.add_argument(
        "--num-probes", type=int, nargs="+", metavar="P", help="first round (default: the index's)"
    )
    parser.add_argument(
        "--then",
        nargs="+",
        default=[_EVERY],
        metavar="P",
        help=f"clusters probed in the second round, or {_EVERY}: every token (default)",
    )
    parser.add_argument(
        "--shares",
        type=float,
        nargs="+",
        default=list(_SHARES),
        metavar="X",
        help="of calibration states that are to lie below the threshold; 0 never looks again",
    )
    parser.add_argument("--max-states", type=int, metavar="N", help="test states (default: all)")
    parser.add_argument(
        "--write",
        action="store_true",
        help="make the one threshold of this run what flashhead_escalate takes from the index "
        "from now on: give one of --num-probes, --then and --shares each",
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the table there too")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the command and return its document."""
    then = [_probes(text) for text in arguments.then]
    if arguments.max_states is not None and arguments.max_states < 1:
        raise UserError(f"--max-states {arguments.max_states} is too few: give at least 1")
    _check_write(arguments)
    model = open_model(arguments.model, synthetic=arguments.synthetic)
    index = arguments.index or ensure_index(model)
    manifest = load_manifest(index)
    if arguments.write and arguments.num_probes not in (None, [manifest.num_probes]):
        raise UserError(
            f"--write keeps a threshold for the index's own {manifest.num_probes} probes: leave "
            f"--num-probes out"
        )
    collect = synthetic_hidden_states if model.synthetic else collect_hidden_states
    calibration, test = collect(model)
    if arguments.max_states is not None:
        # Every so many-th: the sources follow one another.
        step = -(-len(test) // arguments.max_states)
        test = test.subset(torch.arange(0, len(test), step))
    points = escalation_points(
        HeadBuilder(tp=TensorParallel.single(), model=model, index_dir=index),
        calibration,
        test,
        dense_truth(model, test.states),
        num_probes=arguments.num_probes or [manifest.num_probes],
        second_probes=then,
        shares=arguments.shares,
    )
    rows = [asdict(point) for point in points]
    if arguments.write:
        point = points[0]
        manifest = write_escalation(
            index,
            margin=point.margin,
            second_probes=point.second_probes,
            share=point.escalated_share,
        )
    if arguments.csv is not None:
        _write(arguments.csv, rows)
    return {
        "model": model.name,
        "synthetic": model.synthetic,
        "index_hash": manifest.index_hash,
        "hidden_states": test.origin,
        "num_states": len(test),
        # JSON has no infinity.
        "points": [row | {"margin": None if row["asked_share"] == 0 else row["margin"]}
                   for row in rows],
    }  # fmt: skip


def show(document: dict[str, Any]) -> None:
    """Print the document as a table."""
    table = Table(
        title=f"flashhead_escalate against the dense head of {document['model']}",
        caption=f"{document['num_states']} hidden states: {document['hidden_states']}",
    )
    for name in ("probes", "then", "margin <", "escalated, %", "misses caught, %", "bytes, %",
                 "top-1, %", "worst, %", "source"):  # fmt: skip
        table.add_column(name, justify="right")
    for point in document["points"]:
        caught, margin = point["caught"], point["margin"]
        table.add_row(
            str(point["num_probes"]),
            _EVERY if point["second_probes"] is None else str(point["second_probes"]),
            "never" if margin is None else f"{margin:.2f}",
            f"{100 * point['escalated_share']:.2f}",
            "" if caught is None else f"{100 * caught:.0f}",
            f"{100 * point['bytes_share']:.2f}",
            f"{100 * point['top1_agreement']:.3f}",
            f"{100 * point['top1_agreement_worst_source']:.2f}",
            point["worst_source"],
        )
    Console().print(table)


def _check_write(arguments: argparse.Namespace) -> None:
    if not arguments.write:
        return
    if len(arguments.num_probes or [0]) != 1 or len(arguments.then) != 1:
        raise UserError("--write keeps one threshold: give one --num-probes and one --then")
    if len(arguments.shares) != 1 or arguments.shares[0] == 0:
        raise UserError("--write keeps one threshold: give one of --shares, above 0")


def _probes(text: str) -> int | None:
    if text == _EVERY:
        return None
    if not text.isdecimal():
        raise UserError(f"--then {text} is no number of clusters: give one, or {_EVERY}")
    return int(text)


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(rows).to_csv(path, index=False)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}): give another --csv"
        ) from error
