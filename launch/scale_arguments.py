"""What launch/scale.py can be given: its options, their defaults, and what is refused at once."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from math import inf
from pathlib import Path

from escalation_arguments import add_escalation, escalation_of
from flashhead_dist.errors import UserError
from flashhead_dist.heads.registry import HEADS, check_head_names
from rank_parser import DTYPES, RankParser, integers


def parse_arguments(
    argv: Sequence[str] | None, *, description: str | None, world_size: int, speaks: bool
) -> argparse.Namespace:
    """Read the command line on one of `world_size` ranks; only one that `speaks` prints help.

    Adds `escalation`.

    Raises:
        UserError: something given cannot be, whatever the model.
    """
    arguments = _parser(description, speaks=speaks).parse_args(argv)
    _check(arguments, world_size)
    arguments.escalation = escalation_of(arguments, arguments.heads)
    return arguments


def _parser(description: str | None, *, speaks: bool) -> RankParser:
    parser = RankParser("launch/scale.py", speaks=speaks, description=description)
    what = parser.add_argument_group("what to measure")
    what.add_argument("--model", help="HF folder, .gguf file or hub id (default: built in)")
    what.add_argument("--synthetic", metavar="V,D", help="a made-up embedding, marked as such")
    what.add_argument("--index", type=Path, metavar="DIR", help="index folder (default: cached)")
    what.add_argument(
        "--hidden-states", type=Path, metavar="FILE", help="test states [N, D] (default: corpus)"
    )
    what.add_argument(
        "--heads", type=_names, metavar="A,B", help=f"default: all of {', '.join(HEADS)}"
    )
    what.add_argument(
        "--tp-sizes", type=_ascending, metavar="N,N", help="default: 1, 2, 4, ... and all ranks"
    )
    what.add_argument("--batch-sizes", type=_ascending, default=[1, 4, 16], metavar="N,N")
    what.add_argument("--dtype", choices=sorted(DTYPES), help="of the rows (default: as stored)")
    what.add_argument("--num-probes", type=int, metavar="P", help="default: the index's")
    what.add_argument("--alpha", type=float, metavar="A", help="default: the index's")
    add_escalation(what)
    how = parser.add_argument_group("how to measure")
    how.add_argument("--iters", type=int, default=40, metavar="N", help="at most, a cell")
    how.add_argument("--warmup", type=int, default=3, metavar="N")
    how.add_argument(
        "--cell-seconds", type=float, default=12.0, metavar="S", help="time for a cell's iterations"
    )
    how.add_argument(
        "--max-states", type=int, default=1024, metavar="N", help="for agreement; 0: leave it out"
    )
    how.add_argument(
        "--threads-per-rank", type=int, default=1, metavar="N", help="the same at every tp size"
    )
    how.add_argument(
        "--remeasure",
        action="store_true",
        help="choose anew what other runs chose by measuring: where flashhead_auto scans, and "
        "the launches of CUDA kernels",
    )
    how.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda with a GPU a rank")
    how.add_argument("--seed", type=int, default=0, metavar="N")
    out = parser.add_argument_group("what to write")
    out.add_argument("--runs-dir", type=Path, default=Path("runs"), metavar="DIR")
    out.add_argument("--skip-plots", action="store_true")
    out.add_argument("--json", action="store_true", help="one JSON document as the last line")
    return parser


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    check_head_names(names)
    if not names:
        raise UserError(f"--heads names none: choose from {', '.join(HEADS)}")
    return list(dict.fromkeys(names))


def _ascending(text: str) -> list[int]:
    return sorted(set(integers(text)))


_ascending.__name__ = integers.__name__


def _check(arguments: argparse.Namespace, world_size: int) -> None:
    """Fill in defaults and refuse what is wrong whatever the model; raises UserError."""
    if arguments.tp_sizes is None:
        powers = [2**i for i in range(world_size.bit_length()) if 2**i < world_size]
        arguments.tp_sizes = [*powers, world_size]
    for tp_size in arguments.tp_sizes:
        if not 1 <= tp_size <= world_size:
            raise UserError(
                f"tp size {tp_size} does not lie between 1 and the {world_size} ranks started: "
                f"start more with torchrun --nproc-per-node, or change --tp-sizes"
            )
    least = {"iters": 1, "warmup": 0, "max_states": 0, "threads_per_rank": 1, "num_probes": 1}
    for name, minimum in least.items():
        value = getattr(arguments, name)
        if value is not None and value < minimum:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} is {value}: give {minimum} or more")
    for batch_size in arguments.batch_sizes:
        if batch_size < 1:
            raise UserError(f"--batch-sizes holds {batch_size}: give sizes of 1 or more")
    if not 0 < arguments.cell_seconds < inf:
        raise UserError(f"--cell-seconds is {arguments.cell_seconds}: give more than 0, finite")
    if not 0 <= arguments.seed < 2**63:
        raise UserError(f"--seed is {arguments.seed}: give a number from 0 to 2**63 - 1")
