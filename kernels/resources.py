"""What each Triton kernel takes of a processor, compiled ahead of time: no GPU is needed.

    python kernels/resources.py                              for compute capability 9.0 (H100, H200)
    python kernels/resources.py --capability 80 89 90 100 --models gemma-3-270m --tp-sizes 1 8
    python kernels/resources.py --json > resources.json

Every launch of a decoding step at the shapes of the default index is compiled exactly as the
launchers ask for it (`compile_ahead.py`). The columns:

    registers, stack bytes   of a thread; a stack above 0: registers were spilled
    shared bytes             shared memory of a program
    barriers                 BAR instructions in the whole machine code
    loop barriers, bytes     of the main loop, an iteration: its BARs, and the bytes that a thread
                             loads from global memory. The main loop is the innermost one with most
                             integer dot products, else with most bytes loaded; what was unrolled is
                             one iteration; 0 and 0 where no loop is left
    loads of 16 bytes, dp4a  in the PTX; dp4a: integer dot products
    fma                      in the PTX: none where centroids are scored, so that every kernel
                             scores them alike

Exit codes: 0; 1 where a kernel spills more than --allow-spill-bytes or takes more shared memory
than its GPU has (99 KB on sm_89); 2 for a mistake in what was given.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from multiprocessing import get_context

from bench_shapes import MODELS
from compile_ahead import PROCESSORS, Resources, compile_case, exchange_cases, table_cases


@dataclass(frozen=True)
class Task:
    """The `number`-th case of a model on one of `tp_size` ranks; with no model, of the exchange."""

    model: str | None
    tp_size: int
    number: int
    capability: int


def every_task(
    models: Sequence[str], tp_sizes: Sequence[int], capabilities: Sequence[int]
) -> list[Task]:
    """What the table is made of, in its order."""
    tasks = []
    for capability in capabilities:
        for model in models:
            for tp_size in tp_sizes:
                count = len(table_cases(MODELS[model], tp_size))
                tasks += [Task(model, tp_size, number, capability) for number in range(count)]
        tasks += [Task(None, 1, number, capability) for number in range(len(exchange_cases()))]
    return tasks


def compile_task(task: Task) -> list[Resources]:
    """Compile one case, in whichever process."""
    if task.model is None:
        cases = exchange_cases()
    else:
        cases = table_cases(MODELS[task.model], task.tp_size)
    return compile_case(cases[task.number], task.capability)


def compile_tasks(tasks: Sequence[Task], jobs: int) -> Iterator[list[Resources]]:
    """The resources of each task, in order, compiled by `jobs` processes."""
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        yield from pool.map(compile_task, tasks)


def table(found: Sequence[Resources], *, markdown: bool) -> str:
    """Aligned columns, or a Markdown table."""
    names = [field.name.replace("_", " ") for field in fields(Resources)]
    lines = [names, *([_cell(value) for value in one.as_dict().values()] for one in found)]
    if markdown:
        lines.insert(1, ["---", "---", *["---:"] * (len(names) - 2)])
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return aligned(lines)


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Columns of one width, the first two flush left."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place < 2 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def faults(found: Sequence[Resources], allowed_spill_bytes: int) -> list[str]:
    """A line for each kernel that spills or asks for more shared memory than there is."""
    lines = []
    for one in found:
        where = f"{one.kernel}, {one.case}, sm_{one.capability}"
        if one.stack_bytes > allowed_spill_bytes:
            lines.append(f"{where}: spills {one.stack_bytes} bytes a thread")
        if one.exceeds_shared:
            lines.append(f"{where}: takes {one.shared_bytes} bytes of shared memory a program")
    return lines


def _cell(value: object) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--tp-sizes", nargs="+", type=int, default=[1], metavar="P")
    parser.add_argument(
        "--capability", nargs="+", type=int, choices=PROCESSORS, default=[90], metavar="N",
        help=f"sm_N to compile for, some of {', '.join(map(str, PROCESSORS))} (default: 90)",
    )  # fmt: skip
    parser.add_argument(
        "--allow-spill-bytes", type=int, default=0, metavar="N", help="a thread (default: 0)"
    )
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (all cores)"
    )
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="one JSON list on stdout")
    output.add_argument("--markdown", action="store_true", help="a Markdown table on stdout")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; returns an exit code."""
    arguments = _parse(argv)
    for flag, least in (("jobs", 1), ("allow_spill_bytes", 0)):
        if getattr(arguments, flag) < least:
            print(f"error: --{flag.replace('_', '-')} must be at least {least}", file=sys.stderr)
            return 2
    if not 1 <= min(arguments.tp_sizes) <= max(arguments.tp_sizes) <= 128:
        print("error: --tp-sizes must lie between 1 and 128", file=sys.stderr)
        return 2
    tasks = every_task(arguments.models, arguments.tp_sizes, arguments.capability)
    found: list[Resources] = []
    try:
        for number, resources in enumerate(compile_tasks(tasks, arguments.jobs), start=1):
            found += resources
            print(f"compiled {number} of {len(tasks)} calls", file=sys.stderr)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130
    if arguments.json:
        print(json.dumps([one.as_dict() for one in found]))
    else:
        print(table(found, markdown=arguments.markdown))
    wrong = faults(found, arguments.allow_spill_bytes)
    print("\n".join(wrong), end="\n" if wrong else "", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
