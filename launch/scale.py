"""What each output head costs at each tensor-parallel size, on the machine it stands on.

    torchrun --nproc-per-node 8 launch/scale.py                    the default model, every head
    torchrun --nproc-per-node 2 launch/scale.py --model DIR --batch-sizes 1,8
    torchrun --nproc-per-node 2 launch/scale.py --synthetic 32000,1024 --iters 5 --json
    python launch/scale.py --heads flashhead,dense_local_max       one rank

Sweeps groups of the first 1, 2, 4, ... ranks. Uses NCCL and CUDA where every rank has a GPU of its
own, else gloo and the CPU. More ranks than cores are OVERSUBSCRIBED: every table and plot says so,
each rank's compute is measured alone, and what follows from it is labelled a projection.

Without --index the model's default index is used, and built first where it is missing. Writes
records.jsonl, summary.csv, environment.json and plots to RUNS_DIR/<date>_<host class>_<commit>/ and
prints tables. docs/measuring.md says how everything is measured and what each key means.

Exit codes of a rank: 0, 2 for a mistake in what was given, 1 where another rank was lost, 130 after
Ctrl-C. torchrun reports them, and itself exits with 1 for any but 0.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import torch
from ranks import Ranks, World, refuse, run_ranks

from flashhead_dist.collectives import split_tensor_parallel
from flashhead_dist.errors import UserError
from flashhead_dist.evaluate.workload import Request, Workload, prepare_workload
from flashhead_dist.heads.registry import HEAD_NAMES, check_head_names
from flashhead_dist.measure.cell import Effort
from flashhead_dist.measure.control import Control
from flashhead_dist.measure.environment import boot_id, describe_environment, make_provenance
from flashhead_dist.measure.plan import Inputs, Plan
from flashhead_dist.measure.records import RECORDS_NAME, RecordWriter
from flashhead_dist.measure.run_folder import make_run_folder, write_environment
from flashhead_dist.measure.setup import Setup, decide_setup
from flashhead_dist.measure.sweep import Sweep
from flashhead_dist.measure.threads import compute_threads
from flashhead_dist.model_source import ModelSource
from flashhead_dist.report.present import print_report, report_console, write_report
from flashhead_dist.report.progress import SweepProgress
from flashhead_topology.probe import probe_machine

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class _Parser(argparse.ArgumentParser):
    """Raises where argparse exits, and is silent on all ranks but one."""

    speaks = True

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; launch/scale.py --help lists what can be given")

    def print_help(self, file: Any = None) -> None:
        if self.speaks:
            super().print_help(file)


def _parser(*, speaks: bool) -> argparse.ArgumentParser:
    # A flag that is a prefix of one of torchrun's own would be taken by torchrun.
    parser = _Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.speaks = speaks
    what = parser.add_argument_group("what to measure")
    what.add_argument("--model", help="HF folder, .gguf file or hub id (default: built in)")
    what.add_argument("--synthetic", metavar="V,D", help="a made-up embedding, marked as such")
    what.add_argument("--index", type=Path, metavar="DIR", help="index folder (default: cached)")
    what.add_argument(
        "--hidden-states", type=Path, metavar="FILE", help="test states [N, D] (default: corpus)"
    )
    what.add_argument(
        "--heads", type=_names, metavar="A,B", help=f"default: all of {', '.join(HEAD_NAMES)}"
    )
    what.add_argument(
        "--tp-sizes", type=_integers, metavar="N,N", help="default: 1, 2, 4, ... and all ranks"
    )
    what.add_argument("--batch-sizes", type=_integers, default=[1, 4, 16], metavar="N,N")
    what.add_argument("--dtype", choices=sorted(_DTYPES), help="of the rows (default: as stored)")
    what.add_argument("--num-probes", type=int, metavar="P", help="default: the index's")
    what.add_argument("--alpha", type=float, metavar="A", help="default: the index's")
    how = parser.add_argument_group("how to measure")
    how.add_argument("--iters", type=int, default=40, metavar="N", help="at most, a cell")
    how.add_argument("--warmup", type=int, default=3, metavar="N")
    how.add_argument(
        "--cell-seconds", type=float, default=12.0, metavar="S", help="time for a cell's iterations"
    )
    how.add_argument(
        "--max-states", type=int, default=512, metavar="N", help="for agreement; 0: leave it out"
    )
    how.add_argument(
        "--threads-per-rank", type=int, default=1, metavar="N", help="the same at every tp size"
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
    return list(dict.fromkeys(names))


def _integers(text: str) -> list[int]:
    return sorted({int(number) for number in text.split(",")})


_integers.__name__ = "comma-separated integers"  # argparse names it so where it fails


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
    if arguments.cell_seconds <= 0:
        raise UserError(f"--cell-seconds is {arguments.cell_seconds}: give more than 0")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command on this rank and return its exit code."""
    world = World()
    try:
        arguments = _parser(speaks=world.rank == 0).parse_args(argv)
        _check(arguments, world.size)
        setup = decide_setup(
            probe_machine(),
            local_rank=world.local_rank,
            local_world_size=world.local_size,
            threads_per_rank=arguments.threads_per_rank,
            device=arguments.device,
            heads=arguments.heads,
        )
    except UserError as error:
        return refuse(error, speaks=world.rank == 0)
    run = _Run(arguments, setup)
    return run_ranks(world, run.measure, run.parting_words)


class _Run:
    """One rank of a run: the phases between ranks that have met and a printed report."""

    def __init__(self, arguments: argparse.Namespace, setup: Setup) -> None:
        self.arguments, self.setup = arguments, setup
        self.folder: Path | None = None
        self.request = Request(
            heads=setup.heads,
            model=arguments.model,
            synthetic=arguments.synthetic,
            dtype=_DTYPES.get(arguments.dtype),
            index=arguments.index,
            hidden_states=arguments.hidden_states,
            max_states=arguments.max_states,
            seed=arguments.seed,
        )

    def parting_words(self) -> str:
        """Where to find what was measured before the run ended."""
        path = self.folder / RECORDS_NAME if self.folder else None
        return f" The records so far are in {path}." if path and path.exists() else ""

    def measure(self, ranks: Ranks) -> None:
        """Do it all; raises PeerError on every rank, if a user's mistake shows on one."""
        setup, control = self.setup, ranks.control
        environment, folder = self._begin(control)
        workload, model = self._prepare(control)
        ranks.open_group(setup.placement.backend, setup.device)
        plan = self._plan(model)
        with ExitStack() as stack:
            with control.phase():
                path = folder / RECORDS_NAME if control.is_first else Path(os.devnull)
                writer = stack.enter_context(RecordWriter(path))
            progress = SweepProgress(plan.num_stages, visible=control.is_first)
            sweep = Sweep(
                plan=plan,
                inputs=_inputs(model, workload),
                control=control,
                host=boot_id(),
                provenance=make_provenance(
                    environment,
                    setup,
                    model,
                    index_hash=workload.index_hash,
                    num_probes=plan.num_probes,
                    alpha=plan.alpha,
                    seed=self.arguments.seed,
                    world_size=ranks.world.size,
                ),
                write=writer.write,
                progress=stack.enter_context(progress),
            )
            stack.enter_context(compute_threads(setup.threads_per_rank))
            sizes = setup.group_sizes(plan.tp_sizes, ranks.world.size)
            sweep.run(split_tensor_parallel(sizes, device=setup.device))
        with control.phase():
            if control.is_first:
                self._report(sweep, folder, environment | {"hidden_states": workload.origin})

    def _begin(self, control: Control) -> tuple[dict[str, Any], Path]:
        """Describe the run and make its folder, before anything takes long."""
        torch.manual_seed(self.arguments.seed)
        given = {name: str(value) for name, value in vars(self.arguments).items()}
        environment = describe_environment(self.setup, given, self.arguments.tp_sizes)
        made: str | None = None
        with control.phase():
            if control.is_first:
                host_class, commit = self.setup.machine.host_class, environment["commit"]
                runs_dir, now = self.arguments.runs_dir, datetime.now(UTC)
                made = str(make_run_folder(runs_dir, host_class, commit, environment, now))
        self.folder = Path(control.broadcast(made))
        return environment, self.folder

    def _prepare(self, control: Control) -> tuple[Workload, ModelSource]:
        """The first rank, with the whole machine to itself, makes what is missing."""
        made: dict[str, Any] | None = None
        with control.phase():
            if control.is_first:
                with compute_threads(self.setup.machine.num_cores):
                    largest = max(self.arguments.tp_sizes)
                    made = prepare_workload(self.request, largest, progress=True).as_json()
        workload = Workload.from_json(control.broadcast(made))
        with control.phase():
            model = self.request.open_model(progress=False)
        return workload, model

    def _plan(self, model: ModelSource) -> Plan:
        arguments = self.arguments
        return Plan(
            heads=self.setup.heads,
            tp_sizes=arguments.tp_sizes,
            batch_sizes=arguments.batch_sizes,
            dtype=model.dtype,
            num_probes=arguments.num_probes,
            alpha=arguments.alpha,
            effort=Effort(
                iterations=arguments.iters,
                warmup=arguments.warmup,
                cell_seconds=arguments.cell_seconds,
            ),
            num_cores=self.setup.machine.num_cores,
            fit=self.setup.fit,
        )

    def _report(self, sweep: Sweep, folder: Path, environment: dict[str, Any]) -> None:
        costs = {operation.value: asdict(cost) for operation, cost in sweep.costs.items()}
        environment = environment | {"exchange_costs": costs}
        write_environment(folder, environment)
        notes, plots = list(self.setup.notes), not self.arguments.skip_plots
        if plots and find_spec("matplotlib") is None:
            plots = False
            notes.append("plots are SKIPPED: pip install 'flashhead-dist[report]' to draw them.")
        paths = write_report(sweep.records, folder, plots=plots)
        print_report(sweep.records, notes, paths, report_console())
        if self.arguments.json:
            document = {
                "run_dir": str(folder),
                "environment": environment,
                "notes": notes,
                "records": [asdict(record) for record in sweep.records],
            }
            print(json.dumps(document, allow_nan=False), flush=True)


def _inputs(model: ModelSource, workload: Workload) -> Inputs:
    return Inputs(
        model=model,
        index_dir=workload.index_dir,
        states=workload.states,
        source_ids=workload.source_ids,
        sources=workload.sources,
        dense_ids=workload.dense_ids,
    )


if __name__ == "__main__":
    sys.exit(main())
