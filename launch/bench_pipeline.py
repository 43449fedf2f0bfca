"""Overlap of pipeline stages: the measured idle time of each, beside the theoretical one.

    torchrun --nproc-per-node 2 launch/bench_pipeline.py              2 stages, the default model
    torchrun --nproc-per-node 4 launch/bench_pipeline.py --pp-size 2 --micro-batches 1,2,4 --json
    torchrun --nproc-per-node 2 launch/bench_pipeline.py --layers-per-stage 11,7
    torchrun --nproc-per-node 4 launch/bench_pipeline.py --sleep-ms 50,50,50,50

Decodes the same prompts, cut to one length, in 1, 2, ... micro-batches in flight, by two schedules,
interleaved: *continuous*, a micro-batch goes on as soon as its token is back; *flushed*, each step
of all micro-batches ends before the next begins, as in DeepSpeed's own engine. For each the median
run is shown: tokens a second; each stage's idle share; their mean, the measured bubble; the bubble
of equal stages by formula, (p-1)/(m+p-1) where flushed; and the bubble of these stages' measured
compute times if messages took no time (docs/pipeline.md).

Each rank needs a core or a GPU of its own: with fewer, stages wait for each other's cores, the
shares mean nothing, and the table says so. With --sleep-ms the stages are synthetic: each sleeps
instead of computing, so that schedule and messages are measured without compute, with any number of
stages on any machine; such a table says SIMULATED COMPUTE. Exit codes: as of launch/scale.py.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from flashhead_dist.bench.environment import Setup, decide_setup
from flashhead_dist.bench.records import RECORDS_NAME, write_pipeline
from flashhead_dist.decode.sequences import DecodeState
from flashhead_dist.errors import UserError
from flashhead_dist.heads.base import Head
from flashhead_dist.heads.registry import HeadBuilder, check_head_names, needs_index
from flashhead_dist.integrations.pipeline import PipelineDecoder
from flashhead_dist.integrations.pipeline_bubble import (
    continuous_bubble,
    flushed_bubble,
    ideal_bubble,
    measured_bubble,
)
from flashhead_dist.models import ModelSource
from flashhead_kernels.cpu_threads import compute_threads
from flashhead_topology.probe import probe_machine
from options import (
    DTYPES,
    Checked,
    Device,
    DType,
    Folder,
    IndexedModel,
    Integers,
    JsonOutput,
    Positive,
    Value,
    parse,
    values,
)
from pipeline_inputs import corpus_prompts, sleeping_model, synthetic_prompts
from ranks import Ranks, World, refuse_together, run_ranks

_SCHEDULES = {"continuous": False, "flushed": True}


@dataclass(kw_only=True)
class Stages(Checked):
    """The pipeline."""

    pp_size: Positive[int | None] = None
    """stages (default: all ranks)"""
    layers_per_stage: Integers[list[int] | None] = None
    """layers of each stage (default: even)"""
    sleep_ms: Integers[list[int] | None] = None
    """simulate: sleep that long in each stage instead of computing"""
    head: Value[str] = "flashhead"
    """output head"""
    dtype: DType[str] = "fp32"
    """of weights and activations"""
    device: Device[str | None] = None
    """where to run (default: GPUs if there are any)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.pp_size = self.pp_size or World().size
        check_head_names([self.head])
        slept = self.sleep_ms
        if slept is not None and (len(slept) != self.pp_size or min(slept) < 0):
            raise UserError(
                f"--sleep-ms {','.join(map(str, slept))} does not give each of {self.pp_size} "
                f"stages a time: name {self.pp_size} numbers of 0 or more"
            )


@dataclass(kw_only=True)
class Measurement(Checked):
    """How to measure."""

    micro_batches: Integers[list[int]] = field(default_factory=lambda: [1, 2, 4])
    """micro-batches in flight"""
    batch_size: Positive[int] = 1
    """of each micro-batch"""
    prompt_tokens: Positive[int] = 16
    """tokens of a prompt"""
    new_tokens: Positive[int] = 32
    """tokens to decode"""
    repeats: Positive[int] = 3
    """runs, of which the median is shown"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.micro_batches) < 1:
            raise UserError(f"--micro-batches holds {min(self.micro_batches)}: give 1 or more")


@dataclass(kw_only=True)
class Output(JsonOutput):
    """What to write."""

    run_dir: Folder[Path | None] = None
    """a folder of launch/scale.py, whose report then shows the bubbles too"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.run_dir is not None and not (self.run_dir / RECORDS_NAME).is_file():
            raise UserError(
                f"--run-dir {self.run_dir} holds no {RECORDS_NAME}: name a run of scale.py"
            )


@dataclass(kw_only=True)
class PipelineOptions:
    """All options."""

    stages: Stages
    model: IndexedModel
    measurement: Measurement
    output: Output


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command on this rank and return its exit code."""
    world = World()
    try:
        options = parse(
            PipelineOptions, argv, "launch/bench_pipeline.py", __doc__, speaks=world.rank == 0
        )
    except UserError as error:
        return refuse_together(world, error)
    return run_ranks(world, lambda ranks: run(options, ranks), lambda: "")


def run(options: PipelineOptions, ranks: Ranks) -> None:
    """Measure on this rank, and print on the first; raises PeerError where any rank cannot."""
    stages, control = options.stages, ranks.control
    with control.phase():
        setup = decide_setup(
            probe_machine(),
            local_rank=ranks.world.local_rank,
            local_world_size=ranks.world.local_size,
            threads_per_rank=1,
            device=stages.device,
            heads=[stages.head],
        )
        model = None
        if stages.sleep_ms is None:
            model = options.model.open(progress=control.is_first)
    index_dir = options.model.index
    if model is not None and index_dir is None and needs_index(stages.head):
        with control.phase():
            built = str(options.model.index_folder(model)) if control.is_first else ""
        index_dir = Path(control.broadcast(built))
    ranks.open_group(setup.placement.backend, setup.device)
    with compute_threads(setup.threads_per_rank):
        with control.phase():
            decoder = _Decoder(options, model, index_dir, setup)
        results = [
            row
            for num_micro_batches in options.measurement.micro_batches
            for row in decoder.measure(num_micro_batches)
        ]
    if control.is_first:
        _report(options, setup, model, ranks.world.size, results)


class _Decoder:
    """The pipeline of this rank, its head and its prompts."""

    def __init__(
        self,
        options: PipelineOptions,
        model: ModelSource | None,
        index_dir: Path | None,
        setup: Setup,
    ) -> None:
        self.options = options
        stages, world, dtype = options.stages, World(), DTYPES[options.stages.dtype]
        pp_size = stages.pp_size
        assert pp_size is not None
        if world.size % pp_size:
            raise UserError(
                f"--pp-size {pp_size} does not divide the {world.size} ranks: "
                f"start a multiple of it with --nproc-per-node"
            )
        tp_size = world.size // pp_size
        tokenizer: Any = None

        def load() -> Any:
            nonlocal tokenizer
            if model is None:
                assert stages.sleep_ms is not None
                return sleeping_model(pp_size, stages.sleep_ms[world.rank // tp_size])
            body, tokenizer = model.load_body(dtype)
            return body

        self.pipeline = PipelineDecoder(
            load,
            pp_size=pp_size,
            tp_size=tp_size,
            layers_per_stage=stages.layers_per_stage,
            device=setup.device,
        )
        self.head: Head | None = None
        if model is not None and self.pipeline.is_last:
            builder = HeadBuilder(
                tp=self.pipeline.tp,
                model=model,
                index_dir=index_dir,
                dtype=dtype,
                device=setup.device,
            )
            self.head = builder.build(stages.head)
        measurement = options.measurement
        count = max(measurement.micro_batches) * measurement.batch_size
        if model is None:
            self.prompts = synthetic_prompts(count, measurement.prompt_tokens)
        else:
            self.prompts = corpus_prompts(tokenizer, count, measurement.prompt_tokens)

    def measure(self, num_micro_batches: int) -> list[dict[str, Any]]:
        """The run of median bubble of each schedule; they take turns, after one to warm up."""
        measurement, pp_size = self.options.measurement, self.pipeline.pp_size
        runs: dict[str, list[dict[str, Any]]] = {schedule: [] for schedule in _SCHEDULES}
        for repeat in range(-1, measurement.repeats):
            for schedule, flushed in _SCHEDULES.items():
                run = self._run(num_micro_batches, flushed)
                if repeat >= 0:
                    runs[schedule].append(run)
        formulas = {
            "continuous": continuous_bubble(pp_size, num_micro_batches, measurement.new_tokens),
            "flushed": flushed_bubble(pp_size, num_micro_batches),
        }
        rows = []
        for schedule, of_schedule in runs.items():
            of_schedule.sort(key=lambda run: float(run["measured_bubble"]))
            row = {"micro_batches": num_micro_batches, "schedule": schedule}
            row |= {"formula_bubble": formulas[schedule]}
            rows.append(row | of_schedule[len(of_schedule) // 2])
        return rows

    def _run(self, num_micro_batches: int, flushed: bool) -> dict[str, Any]:
        size, new_tokens = self.options.measurement.batch_size, self.options.measurement.new_tokens
        states = [
            DecodeState(
                self.prompts[number * size : (number + 1) * size], max_new_tokens=new_tokens
            )
            for number in range(num_micro_batches)
        ]
        _, stages = self.pipeline.decode(states, self._choose, flushed=flushed)
        total_s = max(stage.total_s for stage in stages)
        return {
            "tokens_per_s": num_micro_batches * size * new_tokens / total_s,
            "stage_idle_shares": [stage.idle_share for stage in stages],
            "stage_step_ms": [1e3 * median(stage.compute_s) for stage in stages],
            "measured_bubble": measured_bubble(stages),
            "ideal_bubble": ideal_bubble(stages, flushed=flushed),
        }

    def _choose(self, hidden: Tensor, positions: Tensor, sequences: Tensor) -> Tensor:
        return hidden.argmax(1) if self.head is None else self.head(hidden).token_ids[:, 0]


def _report(
    options: PipelineOptions,
    setup: Setup,
    model: ModelSource | None,
    world_size: int,
    results: list[dict[str, Any]],
) -> None:
    stages, measurement = options.stages, options.measurement
    assert stages.pp_size is not None
    oversubscribed = setup.fit(world_size).oversubscribed
    what, warning = "stages that sleep: SIMULATED COMPUTE", ""
    if model is not None:
        what = f"{model.name}, {stages.head}"
        warning = " OVERSUBSCRIBED: more ranks than cores or GPUs." if oversubscribed else ""
    table = Table(
        title=f"{what}, pp {stages.pp_size} x tp {world_size // stages.pp_size} on "
        f"{setup.device_name}",
        caption="m micro-batches in flight; ms of a step and idle % by stage; bubbles. "
        f"{stages.dtype}, batch {measurement.batch_size} a micro-batch, "
        f"{measurement.prompt_tokens} prompt and {measurement.new_tokens} new tokens, torch "
        f"{torch.__version__}, median of {measurement.repeats}.{warning}",
        caption_justify="left",
    )
    for column in ("m", "schedule", "tok/s", "ms", "idle %", "measured", "formula", "ideal"):
        table.add_column(column, justify="left" if column == "schedule" else "right")
    for row in results:
        table.add_row(
            str(row["micro_batches"]),
            row["schedule"],
            f"{row['tokens_per_s']:.1f}",
            " ".join(f"{ms:.1f}" for ms in row["stage_step_ms"]),
            " ".join(f"{100 * share:.0f}" for share in row["stage_idle_shares"]),
            *(f"{row[name]:.1%}" for name in ("measured_bubble", "formula_bubble", "ideal_bubble")),
        )
    Console().print(table)
    given = {name: str(value) for name, value in values(options).items()}
    document = given | {"oversubscribed": oversubscribed, "results": results}
    if options.output.run_dir is not None:
        write_pipeline(options.output.run_dir, document)
    if options.output.json:
        print(json.dumps(document))


if __name__ == "__main__":
    sys.exit(main())
