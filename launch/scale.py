"""What each output head costs at each tensor-parallel size, on the machine it stands on.

    torchrun --nproc-per-node 8 launch/scale.py                    the default model, every head
    torchrun --nproc-per-node 2 launch/scale.py --model DIR --batch-sizes 1,8
    torchrun --nproc-per-node 2 launch/scale.py --synthetic 32000,1024 --iters 5 --json
    python launch/scale.py --heads flashhead,dense_local_max       one rank

Sweeps groups of the first 1, 2, 4, ... ranks. Uses NCCL and CUDA where every rank has a GPU of its
own, else gloo and the CPU. More ranks than cores are OVERSUBSCRIBED: every table and plot says so,
each rank's compute is measured alone, and what follows from it is labelled a projection.

Without --index the model's default index is used, and built first where it is missing. Writes
records.jsonl, summary.csv, environment.json, plots and report/report.html (see launch/report.py) to
RUNS_DIR/<date>_<host class>_<commit>/ and prints tables. docs/measuring.md says how everything is
measured and what each key means.

Exit codes of a rank: 0, 2 for a mistake in what was given, 1 where another rank was lost, 130 after
Ctrl-C. torchrun reports them, and itself exits with 1 for any but 0.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from flashhead_dist.bench.cell import Effort
from flashhead_dist.bench.control import Control
from flashhead_dist.bench.crossover import crossover_notes
from flashhead_dist.bench.environment import (
    Setup,
    boot_id,
    decide_setup,
    describe_environment,
    make_provenance,
)
from flashhead_dist.bench.records import (
    RECORDS_NAME,
    RecordWriter,
    make_run_folder,
    write_environment,
)
from flashhead_dist.bench.sweep import Inputs, Plan, Sweep
from flashhead_dist.bench.topology import describe_topology, gather_topology, write_topology
from flashhead_dist.errors import UserError
from flashhead_dist.evaluate.workload import Request, Workload, prepare_workload
from flashhead_dist.heads.base import HeadShape
from flashhead_dist.index import load_manifest
from flashhead_dist.measured_choices import describe_launches, keep_launches
from flashhead_dist.models import ModelSource
from flashhead_dist.parallel import TensorParallel, split_tensor_parallel
from flashhead_dist.progress import progress
from flashhead_dist.report.pictures import write_report
from flashhead_dist.report.serving import write_page
from flashhead_dist.report.tables import print_report, report_console
from flashhead_kernels.cpu_threads import compute_threads
from flashhead_topology.drawing import short_drawing
from flashhead_topology.hardware import Topology
from flashhead_topology.probe import probe_machine
from rank_parser import DTYPES
from ranks import Ranks, World, refuse_together, run_ranks
from scale_arguments import parse_arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command on this rank and return its exit code."""
    world = World()
    try:
        arguments = parse_arguments(
            argv, description=__doc__, world_size=world.size, speaks=world.rank == 0
        )
    except UserError as error:
        return refuse_together(world, error)
    run = _Run(arguments, world)
    return run_ranks(world, run.measure, run.parting_words)


class _Run:
    """One rank of a run: the phases between ranks that have met and a printed report."""

    def __init__(self, arguments: argparse.Namespace, world: World) -> None:
        self.arguments, self.world = arguments, world
        self.folder: Path | None = None

    def parting_words(self) -> str:
        """Where to find what was measured before the run ended."""
        path = self.folder / RECORDS_NAME if self.folder else None
        if path is None or not path.exists() or not path.stat().st_size:
            return " Nothing was measured yet."
        return f" The records so far are in {path}."

    def measure(self, ranks: Ranks) -> None:
        """Do it all; raises PeerError on every rank, if a user's mistake shows on one."""
        control = ranks.control
        with control.phase():
            setup = self._decide()
        environment, folder = self._begin(setup, control)
        topology = gather_topology(control, setup)
        environment["topology"] = describe_topology(topology)
        workload, model = self._prepare(setup, control)
        ranks.open_group(setup.placement.backend, setup.device)
        plan = self._plan(setup, model)
        keep_launches(remeasure=plan.remeasure)
        with ExitStack() as stack:
            with control.phase():
                path = folder / RECORDS_NAME if control.is_first else Path(os.devnull)
                writer = stack.enter_context(RecordWriter(path))
            shown = progress("starting", total=plan.num_stages, visible=control.is_first)
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
                    escalate_below=self.arguments.escalate_below,
                    seed=self.arguments.seed,
                    world_size=self.world.size,
                ),
                write=writer.write,
                progress=stack.enter_context(shown),
            )
            stack.enter_context(compute_threads(setup.threads_per_rank))
            sizes = setup.group_sizes(plan.tp_sizes, self.world.size)
            places = split_tensor_parallel(sizes, device=setup.device)
            sweep.run(places)
        with control.phase():
            if control.is_first:
                environment |= {
                    "head_shape": _head_shape(model, workload, plan),
                    "hidden_states": workload.origin,
                    "key_exchange": _key_exchange(places),
                }
                self._report(sweep, folder, environment, setup.notes, topology)

    def _decide(self) -> Setup:
        return decide_setup(
            probe_machine(),
            local_rank=self.world.local_rank,
            local_world_size=self.world.local_size,
            threads_per_rank=self.arguments.threads_per_rank,
            device=self.arguments.device,
            heads=self.arguments.heads,
        )

    def _begin(self, setup: Setup, control: Control) -> tuple[dict[str, Any], Path]:
        """Describe the run and make its folder, before anything takes long."""
        torch.manual_seed(self.arguments.seed)
        given = {name: str(value) for name, value in vars(self.arguments).items()}
        environment = describe_environment(setup, given, self.arguments.tp_sizes)
        made: str | None = None
        with control.phase():
            if control.is_first:
                host_class, commit = setup.machine.host_class, environment["commit"]
                runs_dir, now = self.arguments.runs_dir, datetime.now(UTC)
                made = str(make_run_folder(runs_dir, host_class, commit, environment, now))
        self.folder = Path(control.broadcast(made))
        return environment, self.folder

    def _prepare(self, setup: Setup, control: Control) -> tuple[Workload, ModelSource]:
        """The first rank, with the whole machine to itself, makes what is missing."""
        arguments = self.arguments
        request = Request(
            heads=setup.heads,
            model=arguments.model,
            synthetic=arguments.synthetic,
            dtype=DTYPES.get(arguments.dtype),
            index=arguments.index,
            hidden_states=arguments.hidden_states,
            max_states=arguments.max_states,
            seed=arguments.seed,
        )
        made: dict[str, Any] | None = None
        with control.phase():
            if control.is_first:
                with compute_threads(setup.machine.num_cores):
                    largest = max(arguments.tp_sizes)
                    made = prepare_workload(request, largest, progress=True).as_json()
        workload = Workload.from_json(control.broadcast(made))
        with control.phase():
            model = request.open_model(progress=False)
        return workload, model

    def _plan(self, setup: Setup, model: ModelSource) -> Plan:
        arguments = self.arguments
        return Plan(
            heads=setup.heads,
            tp_sizes=arguments.tp_sizes,
            batch_sizes=arguments.batch_sizes,
            dtype=model.dtype,
            num_probes=arguments.num_probes,
            alpha=arguments.alpha,
            escalation=arguments.escalation,
            effort=Effort(
                iterations=arguments.iters,
                warmup=arguments.warmup,
                cell_seconds=arguments.cell_seconds,
            ),
            num_cores=setup.machine.num_cores,
            fit=setup.fit,
            remeasure=arguments.remeasure,
        )

    def _report(
        self,
        sweep: Sweep,
        folder: Path,
        environment: dict[str, Any],
        notes: Sequence[str],
        topology: Topology,
    ) -> None:
        costs = {operation.value: asdict(cost) for operation, cost in sweep.costs.items()}
        crossovers = {size: found.as_json() for size, found in sweep.crossovers.items()}
        environment = environment | {
            "exchange_costs": costs,
            "crossovers": crossovers,
            "launches": describe_launches(),
        }
        standing = f"Hardware: {short_drawing(topology)}."
        found = crossover_notes(sweep.crossovers, sweep.records)
        notes = [standing, *notes, *sweep.notes, *found]
        write_environment(folder, environment)
        plots = not self.arguments.skip_plots
        if plots and find_spec("matplotlib") is None:
            plots = False
            notes = [
                *notes,
                "plots are SKIPPED: pip install 'flashhead-dist[report]' to draw them.",
            ]
        paths = write_report(sweep.records, folder, plots=plots)
        paths += write_topology(topology, folder, picture=plots)
        if plots:
            paths.append(write_page(folder))
        print_report(sweep.records, notes, paths, report_console())
        if self.arguments.json:
            document = {
                "run_dir": str(folder),
                "environment": environment,
                "notes": list(notes),
                "records": [asdict(record) for record in sweep.records],
            }
            print(json.dumps(document, allow_nan=False), flush=True)


def _key_exchange(places: Mapping[int, TensorParallel | None]) -> dict[int, dict[str, str]]:
    """What carries packed keys at each `tp_size`, and why."""
    return {
        size: {"method": str(place.exchange_method), "reason": place.exchange_reason}
        for size, place in places.items()
        if place is not None
    }


def _head_shape(model: ModelSource, workload: Workload, plan: Plan) -> dict[str, Any]:
    """What the cost model needs of the heads, for projections from this run."""
    if workload.index_dir is None:
        return asdict(HeadShape.of_model(model, plan.dtype))
    index, size = load_manifest(workload.index_dir), plan.dtype.itemsize
    return asdict(HeadShape.of_index(index, num_probes=plan.num_probes, row_bytes=size))


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
