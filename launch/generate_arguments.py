"""What launch/generate.py can be given: its options, their defaults, what is refused at once."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from escalation_arguments import add_escalation, escalation_of
from flashhead_dist.decode.engine import DENSE, Layout, Variant
from flashhead_dist.errors import UserError
from flashhead_dist.heads.registry import HEADS, check_head_names, sampling_heads
from flashhead_dist.heads.sampling import SamplingParameters
from rank_parser import DTYPES, RankParser, integers

_EXAMPLES = """
examples:
  launch/generate.py --prompt "The capital of France is"
  echo "Once upon a time" | launch/generate.py --prompts - --temperature 0.8 --seed 3
  launch/generate.py --compare --lossless 16                 dense, flashhead, and flashhead checked
  torchrun --nproc-per-node 4 launch/generate.py --pp-size 2 --tp-size 2 --batch-size 2
"""


def parse_arguments(
    argv: Sequence[str] | None, *, description: str | None, world_size: int, speaks: bool
) -> argparse.Namespace:
    """Read the command line on one of `world_size` ranks; only one that `speaks` prints help.

    Adds `variants`, `layout`, `parameters` and `escalation`.

    Raises:
        UserError: something given cannot be, whatever the model.
    """
    parser = _parser(description, speaks=speaks)
    arguments = parser.parse_args(argv)
    _check(arguments)
    if arguments.tp_size is None:
        arguments.tp_size = max(1, world_size // max(1, arguments.pp_size))
    arguments.layout = Layout(arguments.pp_size, arguments.tp_size)
    arguments.layout.check(world_size)
    arguments.parameters = SamplingParameters(
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=arguments.seed,
    )
    if arguments.parameters.is_greedy and (arguments.top_k or arguments.top_p < 1):
        raise UserError(
            "--top-k and --top-p cut what is drawn from, and temperature 0 draws nothing: give "
            "--temperature too, or leave them out"
        )
    arguments.variants = _variants(arguments)
    arguments.escalation = escalation_of(arguments, arguments.heads)
    return arguments


def _parser(description: str | None, *, speaks: bool) -> RankParser:
    parser = RankParser(
        "launch/generate.py", speaks=speaks, description=description, epilog=_EXAMPLES
    )
    what = parser.add_argument_group("what to decode")
    given = what.add_mutually_exclusive_group()
    given.add_argument("--prompt", metavar="TEXT", help="a single prompt")
    given.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="a prompt a line, or .jsonl with `prompt`, `text`, `question` or `turns`; - for "
        "standard input (default: 20 prompts of the shipped corpus)",
    )
    what.add_argument("--max-new-tokens", type=int, default=64, metavar="N")
    what.add_argument("--ignore-eos", action="store_true", help="decode on after a stop token")
    what.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0: greedy")
    what.add_argument("--top-k", type=int, default=0, metavar="K", help="0: all tokens")
    what.add_argument("--top-p", type=float, default=1.0, metavar="P", help="1: all tokens")
    what.add_argument("--seed", type=int, default=0, metavar="N", help="of sampling")
    how = parser.add_argument_group("with what")
    how.add_argument("--model", help="HF folder, .gguf file or hub id (default: built in)")
    how.add_argument("--index", type=Path, metavar="DIR", help="index folder (default: cached)")
    how.add_argument(
        "--head",
        default="flashhead",
        metavar="A[,B]",
        help=f"one or more, in turn: {', '.join(HEADS)}",
    )
    how.add_argument(
        "--lossless",
        type=int,
        default=0,
        metavar="N",
        help="check the last N tokens by one dense pass, and take back what differs",
    )
    how.add_argument(
        "--compare",
        action="store_true",
        help=f"decode with {DENSE}, each head, and each head with --lossless in turn",
    )
    how.add_argument("--num-probes", type=int, metavar="P", help="default: the index's")
    add_escalation(how)
    how.add_argument("--dtype", choices=sorted(DTYPES), default="fp32", help="default: fp32")
    where = parser.add_argument_group("on which ranks")
    where.add_argument("--tp-size", type=int, metavar="N", help="default: all ranks of a stage")
    where.add_argument("--pp-size", type=int, default=1, metavar="N", help="pipeline stages")
    where.add_argument(
        "--layers-per-stage", type=integers, metavar="N,N", help="default: as even as can be"
    )
    where.add_argument("--batch-size", type=int, default=1, metavar="N", help="prompts at once")
    where.add_argument(
        "--micro-batches",
        type=int,
        metavar="N",
        help="batches in flight over the stages (default: as many as there are stages)",
    )
    where.add_argument(
        "--threads-per-rank", type=int, metavar="N", help="default: the cores over the ranks"
    )
    where.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda with a GPU a rank")
    out = parser.add_argument_group("what to write")
    out.add_argument("--out", type=Path, metavar="FILE", help="texts as .jsonl, as they end")
    out.add_argument("--json", action="store_true", help="one JSON document as the last line")
    return parser


def _check(arguments: argparse.Namespace) -> None:
    arguments.heads = [name for name in arguments.head.split(",") if name]
    check_head_names(arguments.heads or [arguments.head])
    for name in arguments.heads:
        if arguments.temperature > 0 and name not in sampling_heads():
            raise UserError(
                f"--head {name} does not sample: choose from "
                f"{', '.join(sampling_heads())}, or leave out --temperature"
            )
    least = {
        "max_new_tokens": 1, "lossless": 0, "num_probes": 1, "tp_size": 1, "pp_size": 1,
        "batch_size": 1, "micro_batches": 1, "threads_per_rank": 1,
    }  # fmt: skip
    for name, minimum in least.items():
        value = getattr(arguments, name)
        if value is not None and value < minimum:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} is {value}: give {minimum} or more")
    if arguments.layers_per_stage is not None and arguments.pp_size == 1:
        raise UserError("--layers-per-stage splits pipeline stages: give --pp-size 2 or more")
    if arguments.micro_batches is None:
        arguments.micro_batches = arguments.pp_size
    elif arguments.pp_size == 1 and arguments.micro_batches > 1:
        raise UserError(
            "--micro-batches are in flight over pipeline stages: give --pp-size 2 or more, or "
            "--batch-size for more prompts at once"
        )


def _variants(arguments: argparse.Namespace) -> list[Variant]:
    """What is decoded with, in order, each once."""
    variants = [Variant(DENSE)] if arguments.compare else []
    for name in arguments.heads:
        if arguments.compare:
            variants.append(Variant(name))
        variants.append(Variant(name, arguments.lossless))
    return list(dict.fromkeys(variants))
