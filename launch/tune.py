"""Choose an index's parameters by measurement, and see what each choice costs in answers.

    python launch/tune.py                                  the default model: settings, times, front
    python launch/tune.py --hold-out languages=10,data-sets=1     keep whole languages out of it all
    python launch/tune.py --target worst=0.997,overall=0.999 --build my_index
    python launch/tune.py --max-bytes 0.10 --apply my_index       new probes and alpha in an index
    python launch/tune.py --quick --skip-times                    three families, in a minute or two

Runs the body over the corpus (or --texts) once and the dense head once, clusters once, and takes
clusters of every other size from that tree. For each number of columns, bits and scale groups
it finds how many clusters go before the right one in each state's probing group: what any
number of probes finds follows. Points on the front that the head can run are then timed beside the
dense head, interleaved; the others are marked as simulated and have no time.

The front is that of top-1 agreement, over all and in the worst source, on the selection states (the
corpus's test part), against bytes a token. What --hold-out names calibrates and chooses nothing:
its figures stand beside those that chose. What --choose-by names of the rest calibrates nothing and
joins the selection states. Both take names of sources and data sets, or numbers: then
names go in the order of their sha256, and a language is taken only if its script is not yet.

Each finished measurement is kept in --out: after Ctrl-C the same command goes on where it ended.
In --out: journal.jsonl, points.csv (all points that no other of their family and alpha beats),
front.csv, front.png, chosen.json, and held_out.safetensors for launch/evaluate.py --hidden-states.

Exit codes: 0, 2 for a mistake in what was given, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from flashhead_dist.errors import INTERRUPTED, UserError
from flashhead_dist.progress import progress
from flashhead_dist.states import save_hidden_states
from flashhead_dist.tune.front import Record, Target, choose, parse_target, undominated
from flashhead_dist.tune.run import (
    Inputs,
    Prepared,
    apply_default,
    build_default,
    evidence,
    fitting,
    frequent_of,
    gather,
    open_journal,
    prepare,
    simulate_all,
)
from flashhead_dist.tune.settings import families, search_space
from flashhead_dist.tune.timing import TimingPlan, layout_of, time_front
from flashhead_topology.probe import probe_machine
from tune_output import TABLE_WIDTH, show, write_outputs


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        document = _tune(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(
            f"\nerror: interrupted; what was finished is kept in {arguments.out}, and the same "
            "command goes on from there.",
            file=sys.stderr,
        )
        return INTERRUPTED
    if arguments.json:
        print(json.dumps(document))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_argument_group("what to tune")
    what.add_argument("--model", help="HF folder, .gguf file or hub id (default: built in)")
    what.add_argument("--synthetic", metavar="V,D", help="a made-up embedding, marked as such")
    what.add_argument("--texts", type=Path, metavar="PATH", help="your corpus: a file or folder")
    what.add_argument(
        "--hold-out", default="", metavar="NAMES",
        help="sources and data sets, or languages=N,data-sets=N (default: none)",
    )  # fmt: skip
    what.add_argument(
        "--choose-by", default="", metavar="NAMES",
        help="of the others: texts that calibrate nothing, and choose beside the test part of what "
        "does, so that the choice is for languages that an index was not made for (default: none)",
    )  # fmt: skip
    what.add_argument(
        "--groups", type=int, default=128, metavar="G", help="probing groups (default: %(default)s)"
    )
    what.add_argument("--quick", action="store_true", help="three families instead of some twenty")
    what.add_argument(
        "--only", default="", metavar="REGEX",
        help="families whose name it finds, such as S4_int4g64 (names: points.csv, column family)",
    )  # fmt: skip
    goal = parser.add_argument_group("what to choose")
    goal.add_argument(
        "--target", default="", metavar="worst=0.997,overall=0.999",
        help="least agreement; fewest bytes win, or with fastest-within=0.01 the fastest among "
        "those of at most 1 %% more",
    )  # fmt: skip
    goal.add_argument(
        "--max-bytes", type=float, metavar="SHARE",
        help="of the dense head's; without --target the surest within it wins: of those that miss "
        "as few states with half of their probes, the one least fitted to calibration states "
        "(default without --target: 0.10)",
    )  # fmt: skip
    goal.add_argument("--simulated", action="store_true", help="choose what no head can run, too")
    goal.add_argument("--build", type=Path, metavar="DIR", help="build the chosen index there")
    goal.add_argument(
        "--apply", type=Path, metavar="DIR", help="choose for this index, and write it there"
    )
    goal.add_argument("--force", action="store_true", help="--build replaces an index")
    how = parser.add_argument_group("how to measure")
    how.add_argument("--batch-sizes", type=_integers, default=[1], metavar="N,N")
    how.add_argument("--iters", type=int, default=40, metavar="N", help="timed steps a point")
    how.add_argument("--threads", type=int, metavar="N", help="of simulation (default: all cores)")
    how.add_argument("--timed-threads", type=int, default=1, metavar="N", help="of timed heads")
    how.add_argument("--device", default="cpu", help="where heads are timed: cpu or cuda")
    how.add_argument("--skip-times", action="store_true", help="time nothing")
    where = parser.add_argument_group("where")
    where.add_argument("--out", type=Path, default=Path("runs/tune"), metavar="DIR")
    where.add_argument(
        "--mark", action="append", default=[], metavar="LABEL=FILE",
        help="a point of the picture: what launch/evaluate.py fidelity --json printed",
    )  # fmt: skip
    where.add_argument("--skip-plots", action="store_true")
    where.add_argument("--json", action="store_true", help="one JSON document on stdout")
    return parser


def _integers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


_integers.__name__ = "comma-separated integers"  # argparse names it so where it fails


def _check(arguments: argparse.Namespace) -> None:
    for flag, value in (
        ("--iters", arguments.iters),
        ("--groups", arguments.groups),
        ("--threads", arguments.threads or 1),
        ("--timed-threads", arguments.timed_threads),
        ("--batch-sizes", min(arguments.batch_sizes)),
    ):
        if value < 1:
            raise UserError(f"{flag} holds {value}: give 1 or more")
    if arguments.max_bytes is not None and not 0 < arguments.max_bytes <= 1:
        raise UserError(f"--max-bytes is {arguments.max_bytes}: give a share such as 0.10")
    try:
        re.compile(arguments.only)
    except re.error as error:
        raise UserError(f"--only {arguments.only!r} is no pattern ({error}): correct it") from error
    if arguments.build and arguments.apply:
        raise UserError("--build makes an index and --apply changes one: give one of them")


def _tune(arguments: argparse.Namespace) -> dict[str, Any]:
    _check(arguments)
    most = arguments.max_bytes
    if most is None and not arguments.target:
        most = 0.10
    target = parse_target(arguments.target, most)
    started_s = time.monotonic()
    threads = arguments.threads or probe_machine().num_cores
    inputs = gather(
        arguments.model, arguments.synthetic, arguments.texts, arguments.hold_out,
        arguments.choose_by, arguments.groups,
    )  # fmt: skip
    journal = open_journal(arguments.out, inputs, quick=arguments.quick)
    prepared, frequent, records = _simulate(arguments, inputs, journal, threads)
    data = prepared.data
    ours = [record for record in records if layout_of(record, data.shape) is not None]
    front, ours_front = undominated(records), undominated(ours)
    timed: list[Record] = []
    if not arguments.skip_times:
        likely, _ = _choose(arguments, target, records, ours, [])
        if likely is not None and likely in ours and likely not in ours_front:
            ours_front = [*ours_front, likely]
        layouts = {layout_of(record, data.shape) for record in ours_front}
        with progress("starting", total=len(layouts), visible=True) as advance:
            timed = time_front(
                [*ours_front, *(r for r in front if r not in ours_front)],
                data, inputs.model, journal,
                TimingPlan(
                    arguments.batch_sizes, arguments.iters, arguments.timed_threads,
                    arguments.device,
                ),
                on_layout=lambda name: advance.stage(f"timing {name}"),
            )  # fmt: skip
    chosen, refusal = _choose(arguments, target, records, ours, timed)
    used = resource.getrusage(resource.RUSAGE_SELF)
    document: dict[str, Any] = {
        "model": inputs.model.name,
        "synthetic": inputs.model.synthetic,
        "held_out": list(inputs.hold_out.names),
        "choose_by": list(inputs.choose_by.names),
        "target": str(target),
        "chosen": chosen,
        "num_points": len(records),
        "seconds": round(time.monotonic() - started_s, 1),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        "peak_resident_bytes": used.ru_maxrss * 1024,
    }
    if prepared.parts.held_out is not None:
        save_hidden_states(arguments.out / "held_out.safetensors", prepared.parts.held_out)
    paths = write_outputs(arguments, document, records, ours, front, timed)
    wide = Console(width=max(Console().width, TABLE_WIDTH))
    show(wide, document, front, ours_front, timed, paths)
    if chosen is None:
        raise UserError(refusal)
    notes = evidence(chosen, target, inputs, len(records))
    if arguments.build:
        build_default(
            chosen, notes, prepared, inputs.model, frequent, arguments.build,
            replace_existing=arguments.force,
        )  # fmt: skip
        print(f"built {arguments.build}", file=sys.stderr)
    if arguments.apply:
        apply_default(arguments.apply, chosen, notes)
        print(f"wrote probes and alpha into {arguments.apply}", file=sys.stderr)
    return document


def _choose(
    arguments: argparse.Namespace,
    target: Target,
    records: list[Record],
    ours: list[Record],
    timed: list[Record],
) -> tuple[Record | None, str]:
    """The choice, or None and why there is none: what was measured is written in either case."""
    try:
        return choose(_eligible(arguments, records, ours, timed), target), ""
    except UserError as error:
        return None, str(error)


def _simulate(
    arguments: argparse.Namespace, inputs: Inputs, journal: Any, threads: int
) -> tuple[Prepared, list[int], list[Record]]:
    prepared = prepare(inputs, arguments.out, threads)
    shape = prepared.data.shape
    chosen = [
        family
        for family in families(shape, quick=arguments.quick)
        if re.search(arguments.only, family.key)
    ]
    if not chosen:
        raise UserError(f"--only {arguments.only!r} finds no family: leave it out to see them all")
    space = search_space(shape.num_groups, quick=arguments.quick)
    frequent = frequent_of(inputs.model, max(count for _, count in space.pins))
    with progress("starting", total=len(chosen), visible=True) as advance:
        records = simulate_all(
            prepared.data, chosen, space, frequent, journal, threads,
            on_family=lambda name: advance.stage(f"simulating {name}"),
        )  # fmt: skip
    return prepared, frequent, records


def _eligible(
    arguments: argparse.Namespace, records: list[Record], ours: list[Record], timed: list[Record]
) -> list[Record]:
    """What may be chosen: with times where there are any, of the smallest batch size."""
    points = records if arguments.simulated and not arguments.apply else ours
    if arguments.apply:
        return fitting(points, arguments.apply)
    smallest = min(arguments.batch_sizes)
    measured = [r for r in timed if r["measured"] and r["batch_size"] == smallest]
    return [*measured, *points] if measured else points


if __name__ == "__main__":
    sys.exit(main())
