"""Time the head kernels on a GPU: FlashHead beside dense heads and the published operations.

    python kernels/bench.py                    all models, tp sizes and batch sizes, on the GPU
    python kernels/bench.py --models gemma-3-270m --tp-sizes 1 --batch-sizes 1 --json
    python kernels/bench.py --device cpu --synthetic 4096,64 --iters 5     the same code on a CPU

Six ways to the greedy token of one rank's shard, interleaved, on made-up weights that are rotated
past the cache. Each way is checked against its definition before it is timed: where it gives a
wrong token or fails it is left out, the others are measured, and the run ends with code 1. A token
whose logit ties with the best within the rounding of the sum is counted and right. docs/kernels.md
says what the columns mean.

    flashhead               the project's kernel, one launch or two as it chooses
    flashhead_two_launches  centroid scores first, then candidates (where the device has both)
    dense_fused             the project's dense kernel: rows scored and reduced in one scan
    dense_torch             torch.nn.functional.linear and max
    published_eager         FlashHead as published (arXiv 2603.14591) in eager torch: C = V/16
                            unit-norm centroids, p = C/16 probes, matmul, topk, gather, bmm, argmax
    published_graph         the same in a CUDA graph, where torch can capture it

Written into --out: kernels.csv, kernels.png, kernels.md (to be committed) and environment.json.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench_cell import Bench, Measurement, measure_shard
from bench_report import (
    PNG_NAME,
    WHAT_IS_MEASURED,
    device_name,
    device_slug,
    draw,
    make_environment,
    make_tables,
    verdicts,
    write_files,
)
from bench_shapes import GROUPS, MODELS, SCALE_GROUP, SMALLEST_VOCABULARY, Shape
from flashhead_kernels.dispatch import ops_for
from flashhead_kernels.timing import clock_of

_ROOT = Path(__file__).resolve().parent.parent
_INTERRUPTED = 130
_LEAST_WIDTH = 130


class MistakeError(Exception):
    """What the user can mend, in one sentence."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", metavar="NAME,NAME", help=f"default: all, {','.join(MODELS)}")
    parser.add_argument("--synthetic", metavar="V,D", help="a shape of your own, in their place")
    parser.add_argument("--tp-sizes", type=_integers, default=[1, 2, 4, 8], metavar="N,N")
    parser.add_argument(
        "--batch-sizes", type=_integers, default=[1, 2, 4, 8, 16, 32], metavar="N,N"
    )
    parser.add_argument("--iters", type=int, default=50, metavar="N", help="default 50")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="default: docs/kernels/<GPU>, on a CPU runs/kernels"
    )
    parser.add_argument("--json", action="store_true", help="one JSON document as the last line")
    return parser


def _integers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


_integers.__name__ = "comma-separated integers"  # argparse names it so where it fails


def choose_shapes(arguments: argparse.Namespace) -> list[Shape]:
    """The shapes asked for; raises MistakeError."""
    if arguments.synthetic is not None:
        if arguments.models is not None:
            raise MistakeError("--models and --synthetic exclude each other: give one of them")
        match = re.fullmatch(r"(\d+),(\d+)", arguments.synthetic)
        if match is None:
            raise MistakeError(
                f"--synthetic {arguments.synthetic} is not V,D: give two integers such as 4096,64"
            )
        vocab_size, hidden_size = int(match[1]), int(match[2])
        if vocab_size < SMALLEST_VOCABULARY:
            raise MistakeError(
                f"--synthetic has a vocabulary of {vocab_size}: give {SMALLEST_VOCABULARY} or more"
            )
        if hidden_size < 1 or hidden_size % SCALE_GROUP:
            raise MistakeError(
                f"--synthetic has a hidden size of {hidden_size}: give a multiple of {SCALE_GROUP}"
            )
        return [Shape(f"synthetic-{vocab_size}-{hidden_size}", vocab_size, hidden_size)]
    names = list(MODELS) if arguments.models is None else arguments.models.split(",")
    for name in names:
        if name not in MODELS:
            raise MistakeError(f"--models holds {name!r}: give some of {','.join(MODELS)}")
    return [MODELS[name] for name in dict.fromkeys(names)]


def check(arguments: argparse.Namespace) -> None:
    """Refuse numbers and devices that cannot be served; raises MistakeError."""
    for flag, numbers in (
        ("--iters", [arguments.iters]),
        ("--tp-sizes", arguments.tp_sizes),
        ("--batch-sizes", arguments.batch_sizes),
    ):
        if min(numbers) < 1:
            raise MistakeError(f"{flag} holds {min(numbers)}: give 1 or more")
    if max(arguments.tp_sizes) > GROUPS:
        raise MistakeError(
            f"--tp-sizes holds {max(arguments.tp_sizes)}: give {GROUPS} or less, one group a rank"
        )
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise MistakeError(
            "torch finds no CUDA device: run this on a machine with an NVIDIA GPU and a CUDA build "
            "of torch, or give --device cpu to run the same code on the CPU"
        )


def make_folder(arguments: argparse.Namespace, name: str) -> Path:
    """The folder that files go into, made before anything is timed; raises MistakeError."""
    where = Path("runs", "kernels") if arguments.device == "cpu" else Path("docs", "kernels")
    folder: Path = arguments.out or _ROOT / where / device_slug(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MistakeError(
            f"{folder} cannot be made ({error.strerror}): give another --out"
        ) from error
    return folder


def measure(
    bench: Bench, shapes: Sequence[Shape], arguments: argparse.Namespace, found: list[Measurement]
) -> None:
    """Measure all cells into `found`, so that what ends it early leaves the earlier ones."""
    tp_sizes, batch_sizes = sorted(set(arguments.tp_sizes)), sorted(set(arguments.batch_sizes))
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as progress:
        total = len(shapes) * len(tp_sizes) * len(batch_sizes)
        task = progress.add_task("starting", total=total)
        for shape in shapes:
            for tp_size in tp_sizes:
                progress.update(task, description=f"{shape.name}, tp {tp_size}")
                shard = measure_shard(
                    bench, shape, tp_size, batch_sizes, lambda: progress.advance(task)
                )
                for one in shard:  # not extend: what ends it early must leave these
                    found.append(one)


def report(
    bench: Bench, found: Sequence[Measurement], environment: dict[str, Any], folder: Path
) -> dict[str, Any]:
    """Print tables and verdicts, write the files, and return the JSON document."""
    frame = pd.DataFrame([one.as_dict() for one in found])
    console = Console()
    if not console.is_terminal:
        console = Console(width=_LEAST_WIDTH)
    for table in make_tables(frame):
        console.print(table)
    judged = verdicts(frame)
    notes = _all_notes(bench, found)
    for line in (*notes, *(verdict.text for verdict in judged)):
        console.print(line, highlight=False, markup=False)
    paths = write_files(frame, environment, notes, folder)
    try:
        draw(frame, f"{WHAT_IS_MEASURED} {environment['summary']}", folder / PNG_NAME)
        paths.append(folder / PNG_NAME)
    except ImportError:
        print("no picture: pip install 'flashhead-dist[report]' brings matplotlib", file=sys.stderr)
    console.print(f"written: {', '.join(str(path) for path in paths)}", highlight=False)
    return {
        "environment": environment,
        "notes": notes,
        "failures": bench.failures,
        "verdicts": [{"text": verdict.text, "met": verdict.met} for verdict in judged],
        "results": frame.to_dict("records"),
    }


def _all_notes(bench: Bench, found: Sequence[Measurement]) -> list[str]:
    """What could not be measured, what failed, and how many tokens were ties."""
    checked, ties = sum(one.num_checked for one in found), sum(one.num_ties for one in found)
    counted = f"{checked:,} tokens were checked, {ties:,} of them ties within rounding"
    return [*bench.notes, *(f"FAILED: {failure}" for failure in bench.failures), counted]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return an exit code."""
    arguments = _parser().parse_args(argv)
    try:
        shapes = choose_shapes(arguments)
        check(arguments)
        ops = ops_for(arguments.device)
        name = device_name(arguments.device)
        folder = make_folder(arguments, name)
    except (MistakeError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    clock = clock_of(torch.device(arguments.device))
    bench = Bench(name, clock, ops, arguments.iters, seed=0)
    found: list[Measurement] = []
    ended, code, complete = "", 0, False
    try:
        measure(bench, shapes, arguments, found)
        complete = True
    except KeyboardInterrupt:
        ended, code = "interrupted", _INTERRUPTED
    except torch.OutOfMemoryError:
        code = 2
        ended = "the device is out of memory: give fewer --batch-sizes or larger --tp-sizes"
    finally:
        # A kernel that fails keeps its traceback; what was measured before it is written first.
        if found:
            environment = make_environment(bench, vars(arguments), complete=complete)
            try:
                document = report(bench, found, environment, folder)
            except OSError as error:
                ended = f"{folder} cannot be written ({error.strerror}): give another --out"
                code = 2
            else:
                if arguments.json:
                    print(json.dumps(document))
    for failure in bench.failures:
        print(f"error: {failure}", file=sys.stderr)
    if ended:
        print(f"error: {ended}", file=sys.stderr)
    return code or (1 if bench.failures else 0)


if __name__ == "__main__":
    sys.exit(main())
