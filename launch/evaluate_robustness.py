"""The command `robustness` of evaluate.py: indexes of heads like other models', and of odd ones."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table

from flashhead_dist.errors import UserError
from flashhead_dist.evaluate.robustness import HeadSpec, robustness_specs, try_head
from flashhead_dist.index import IndexOptions
from flashhead_kernels.cpu_threads import compute_threads
from flashhead_topology.probe import probe_machine

COMMANDS = ("robustness",)
_DIVISOR, _HIDDEN_SIZE = 4, 256


def add_commands(commands: Any) -> None:
    """Add the command to the subparsers of evaluate.py."""
    names = ", ".join(spec.name for spec in robustness_specs())
    robustness = commands.add_parser(
        "robustness",
        help="indexes of made-up heads: other models' shapes, odd rows",
        description="Makes output embeddings after published figures of Llama-3 and Qwen-3, with "
        "uneven vocabularies, huge, equal and all-zero rows, builds the default index of each, and "
        "says how faithful it is on made-up states, how balanced, and whether ids are equal at "
        f"every tp size (docs/results/robustness.md). Heads: {names}. Indexes stay in the cache.",
    )
    robustness.add_argument("--cases", nargs="+", metavar="NAME", help="default: all heads")
    robustness.add_argument(
        "--divisor", type=int, default=_DIVISOR, metavar="N",
        help="of the vocabulary (default: %(default)s); 1 is full size, some minutes a head",
    )  # fmt: skip
    robustness.add_argument(
        "--hidden-size", type=int, metavar="D",
        help=f"default: {_HIDDEN_SIZE}, or the model's own with --divisor 1",
    )  # fmt: skip
    robustness.add_argument(
        "--states", type=int, default=500, metavar="N", help="test states a source"
    )
    robustness.add_argument("--groups", type=int, default=128, metavar="G", help="probing groups")
    robustness.add_argument("--num-probes", type=int, metavar="P", help="default: 1 row in 32")
    robustness.add_argument("--threads", type=int, metavar="N", help="default: all cores")
    robustness.add_argument("--csv", type=Path, metavar="FILE", help="write the table")
    robustness.add_argument("--json", action="store_true", help="one JSON document on stdout")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the command and return its document.

    Raises:
        UserError: something given cannot be used.
    """
    for name in ("divisor", "hidden_size", "states"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value} is too small: give at least 1")
    size = arguments.hidden_size or (None if arguments.divisor == 1 else _HIDDEN_SIZE)
    specs = _chosen(arguments.cases, robustness_specs(arguments.divisor, size))
    options = IndexOptions(num_groups=arguments.groups, num_probes=arguments.num_probes)
    for spec in specs:
        options.check(spec.vocab_size, spec.hidden_size)
    console = Console(stderr=True)
    trials = []
    with compute_threads(arguments.threads or probe_machine().num_cores):
        for number, spec in enumerate(specs, start=1):
            console.print(
                f"[{number}/{len(specs)}] {spec.name}, {spec.vocab_size:,} x {spec.hidden_size}",
                markup=False, highlight=False,
            )  # fmt: skip
            trial = try_head(spec, options=options, num_states=arguments.states)
            trials.append(asdict(trial))
            _write_csv(arguments.csv, trials)
    return {"divisor": arguments.divisor, "trials": trials}


def _chosen(names: list[str] | None, specs: list[HeadSpec]) -> list[HeadSpec]:
    known = {spec.name: spec for spec in specs}
    for name in names or ():
        if name not in known:
            raise UserError(f"there is no head named {name!r}: choose from {', '.join(known)}")
    return [known[name] for name in names] if names else specs


def _write_csv(path: Path | None, trials: list[dict[str, Any]]) -> None:
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        pd.json_normalize(trials).to_csv(path, index=False, float_format="%.6g")
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): name another --csv") from (
            error
        )


def show(document: dict[str, Any]) -> None:
    """Print the document as a table."""
    table = Table(
        title="Made-up heads and their default indexes",
        caption="top-1: the head's best logit is the dense head's (in brackets: the token as well, "
        "where equal rows tie); tokens: fewest and most in a cluster; work: bytes that the busiest "
        "of tp ranks reads over the mean",
    )
    for name in ("head", "V x D", "bytes, %", "top-1, %", "worst source, %", "tokens, pads"):
        table.add_column(name, justify="left" if name == "head" else "right")
    table.add_column("work at tp 2, 3, 5, 8", justify="right")
    table.add_column("equal ids at tp", justify="right")
    for trial in document["trials"]:
        work = {int(size): ratio for size, ratio in trial["work_max_over_mean"].items()}
        fewest, most = trial["tokens_a_cluster"]
        table.add_row(
            trial["name"],
            f"{trial['vocab_size']:,} x {trial['hidden_size']}",
            f"{100 * trial['bytes_share']:.1f}",
            f"{100 * trial['top1_logit']:.2f} ({100 * trial['top1_token']:.2f})",
            f"{100 * trial['worst_top1_logit']:.2f} {trial['worst_source']}",
            f"{fewest} to {most}, {trial['num_pads']}",
            ", ".join(f"{work[size]:.3f}" for size in (2, 3, 5, 8) if size in work),
            _ranges(trial["equal_tp_sizes"]),
        )
    Console().print(table)


def _ranges(sizes: list[int]) -> str:
    if sizes and sizes == list(range(sizes[0], sizes[-1] + 1)):
        return f"{sizes[0]} to {sizes[-1]}"
    return ", ".join(map(str, sizes)) or "none"
