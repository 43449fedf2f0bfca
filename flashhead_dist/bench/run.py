"""A run of the sweep on one rank: from options to records, notes and the files of a run folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
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
from flashhead_dist.bench.sweep import Plan, Sweep
from flashhead_dist.bench.topology import describe_topology, gather_topology, write_topology
from flashhead_dist.evaluate.workload import Request, Workload, prepare_workload
from flashhead_dist.heads.base import HeadShape
from flashhead_dist.heads.flashhead_escalate import Escalation
from flashhead_dist.index import load_manifest
from flashhead_dist.measured_choices import describe_launches, keep_launches
from flashhead_dist.models import ModelSource
from flashhead_dist.parallel import TensorParallel, split_tensor_parallel
from flashhead_dist.progress import progress
from flashhead_kernels.cpu_threads import compute_threads
from flashhead_topology.drawing import short_drawing
from flashhead_topology.hardware import Topology
from flashhead_topology.probe import probe_machine

OpenGroup = Callable[[str, torch.device], None]
"""Opens the process group with a backend, for a device."""


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What to measure and how; the same on every rank.

    request: its heads may be empty, for the default ones.
    given: every option as text, for `environment.json`.
    """

    request: Request
    tp_sizes: Sequence[int]
    batch_sizes: Sequence[int]
    num_probes: int | None
    alpha: float | None
    escalation: Escalation | None
    effort: Effort
    threads_per_rank: int
    device: str | None
    remeasure: bool
    runs_dir: Path
    plots: bool
    given: Mapping[str, str]


@dataclass
class Run:
    """One rank of a run among `num_ranks`.

    folder: once it is made, on every rank. The rest is filled in on the first rank.
    """

    options: RunOptions
    num_ranks: int
    folder: Path | None = None
    environment: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    sweep: Sweep | None = None
    files: list[Path] = field(default_factory=list)

    def parting_words(self) -> str:
        """Where to find what was measured before the run ended."""
        path = self.folder / RECORDS_NAME if self.folder else None
        if path is None or not path.exists() or not path.stat().st_size:
            return " Nothing was measured yet."
        return f" The records so far are in {path}."

    def measure(
        self, control: Control, open_group: OpenGroup, local_rank: int, local_size: int
    ) -> None:
        """Measure everything and write records and the description of the run.

        local_rank, local_size: of this rank on its host.

        Raises:
            PeerError: on every rank, for a mistake of the user that shows on one.
        """
        options = self.options
        with control.phase():
            setup = decide_setup(
                probe_machine(),
                local_rank=local_rank,
                local_world_size=local_size,
                threads_per_rank=options.threads_per_rank,
                device=options.device,
                heads=options.request.heads or None,
            )
        self._make_folder(setup, control)
        topology = gather_topology(control, setup)
        self.environment["topology"] = describe_topology(topology)
        workload, model = self._prepare(setup, control)
        open_group(setup.placement.backend, setup.device)
        plan = self._plan(setup, model)
        keep_launches(remeasure=plan.remeasure)
        places = self._sweep(setup, plan, workload, model, control)
        with control.phase():
            if control.is_first:
                self._describe(setup, plan, workload, model, places)
                self._write(topology)

    def _make_folder(self, setup: Setup, control: Control) -> None:
        """Describe the run and make its folder, before anything takes long."""
        options = self.options
        torch.manual_seed(options.request.seed)
        self.environment = describe_environment(setup, options.given, options.tp_sizes)
        made: str | None = None
        with control.phase():
            if control.is_first:
                host_class, commit = setup.machine.host_class, self.environment["commit"]
                now = datetime.now(UTC)
                folder = make_run_folder(
                    options.runs_dir, host_class, commit, self.environment, now
                )
                made = str(folder)
        self.folder = Path(control.broadcast(made))

    def _prepare(self, setup: Setup, control: Control) -> tuple[Workload, ModelSource]:
        """The first rank, with the whole machine to itself, makes what is missing."""
        request = replace(self.options.request, heads=setup.heads)
        made: dict[str, Any] | None = None
        with control.phase():
            if control.is_first:
                with compute_threads(setup.machine.num_cores):
                    largest = max(self.options.tp_sizes)
                    made = prepare_workload(request, largest, progress=True).as_json()
        workload = Workload.from_json(control.broadcast(made))
        with control.phase():
            model = request.open_model(progress=False)
        return workload, model

    def _plan(self, setup: Setup, model: ModelSource) -> Plan:
        options = self.options
        return Plan(
            heads=setup.heads,
            tp_sizes=options.tp_sizes,
            batch_sizes=options.batch_sizes,
            dtype=model.dtype,
            num_probes=options.num_probes,
            alpha=options.alpha,
            escalation=options.escalation,
            effort=options.effort,
            num_cores=setup.machine.num_cores,
            fit=setup.fit,
            remeasure=options.remeasure,
        )

    def _sweep(
        self, setup: Setup, plan: Plan, workload: Workload, model: ModelSource, control: Control
    ) -> Mapping[int, TensorParallel | None]:
        """This rank's places by `tp_size`, once all records are written."""
        assert self.folder is not None
        escalation = self.options.escalation
        with ExitStack() as stack:
            with control.phase():
                path = self.folder / RECORDS_NAME if control.is_first else Path(os.devnull)
                writer = stack.enter_context(RecordWriter(path))
            advance = stack.enter_context(
                progress("starting", total=plan.num_stages, visible=control.is_first)
            )
            self.sweep = Sweep(
                plan=plan,
                model=model,
                workload=workload,
                control=control,
                host=boot_id(),
                provenance=make_provenance(
                    self.environment,
                    setup,
                    model,
                    index_hash=workload.index_hash,
                    num_probes=plan.num_probes,
                    alpha=plan.alpha,
                    escalate_below=escalation.margin if escalation else None,
                    seed=self.options.request.seed,
                    world_size=self.num_ranks,
                ),
                write=writer.write,
                progress=advance,
            )
            stack.enter_context(compute_threads(setup.threads_per_rank))
            sizes = setup.group_sizes(plan.tp_sizes, self.num_ranks)
            places = split_tensor_parallel(sizes, device=setup.device)
            self.sweep.run(places)
        return places

    def _describe(
        self,
        setup: Setup,
        plan: Plan,
        workload: Workload,
        model: ModelSource,
        places: Mapping[int, TensorParallel | None],
    ) -> None:
        """Complete the environment and the notes."""
        sweep = self.sweep
        assert sweep is not None
        if workload.index_dir is None:
            shape = HeadShape.of_model(model, plan.dtype)
        else:
            shape = HeadShape.of_index(
                load_manifest(workload.index_dir),
                num_probes=plan.num_probes,
                row_bytes=plan.dtype.itemsize,
            )
        self.environment |= {
            "head_shape": asdict(shape),
            "hidden_states": workload.origin,
            "key_exchange": {
                size: {"method": str(place.exchange_method), "reason": place.exchange_reason}
                for size, place in places.items()
                if place is not None
            },
            "exchange_costs": {name.value: asdict(cost) for name, cost in sweep.costs.items()},
            "crossovers": {size: found.as_json() for size, found in sweep.crossovers.items()},
            "launches": describe_launches(),
        }
        self.notes += [*setup.notes, *sweep.notes]
        self.notes += crossover_notes(sweep.crossovers, sweep.records)

    def _write(self, topology: Topology) -> None:
        assert self.folder is not None
        self.notes.insert(0, f"Hardware: {short_drawing(topology)}.")
        write_environment(self.folder, self.environment)
        if self.options.plots and find_spec("matplotlib") is None:
            self.options = replace(self.options, plots=False)
            self.notes.append("plots are SKIPPED: install matplotlib to draw them.")
        self.files += write_topology(topology, self.folder, picture=self.options.plots)
