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
compute times if messages took no time (docs/concepts/pipeline.md).

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
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from flashhead_dist.bench.environment import Setup, decide_setup
from flashhead_dist.bench.records import RECORDS_NAME, write_pipeline
from flashhead_dist.decode.loop import Choose
from flashhead_dist.errors import UserError
from flashhead_dist.heads.base import Head
from flashhead_dist.heads.registry import HeadBuilder, check_head_names, needs_index
from flashhead_dist.integrations.pipeline import PipelineDecoder
from flashhead_dist.integrations.pipeline_bench import (
    bubble_table,
    corpus_prompts,
    measure_bubbles,
    sleeping_model,
    synthetic_prompts,
)
from flashhead_dist.models import ModelSource
from flashhead_kernels.cpu_threads import compute_threads
from flashhead_topology.probe import probe_machine
from options import (
    DTYPES,
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
from ranks import Ranks, World, refuse_together, run_ranks


@dataclass(kw_only=True)
class Options(IndexedModel, JsonOutput):
    """Options of the script."""

    pp_size: Positive[int | None] = None
    """stages (default: all ranks)"""
    layers_per_stage: Integers[list[int] | None] = None
    """layers of each stage (default: even)"""
    sleep_ms: Integers[list[int] | None] = None
    """simulate: sleep that long in each stage instead of computing"""
    micro_batches: Integers[list[int]] = field(default_factory=lambda: [1, 2, 4])
    """micro-batches in flight"""
    batch_size: Positive[int] = 1
    """of each micro-batch"""
    head: Value[str] = "flashhead"
    """output head"""
    dtype: DType[str] = "fp32"
    """of weights and activations"""
    prompt_tokens: Positive[int] = 16
    """tokens of a prompt"""
    new_tokens: Positive[int] = 32
    """tokens to decode"""
    repeats: Positive[int] = 3
    """runs, of which the median is shown"""
    device: Device[str | None] = None
    """where to run (default: GPUs if there are any)"""
    run_dir: Folder[Path | None] = None
    """a folder of launch/scale.py, whose report then shows the bubbles too"""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.pp_size = self.pp_size or World().size
        check_head_names([self.head])
        if min(self.micro_batches) < 1:
            raise UserError(f"--micro-batches holds {min(self.micro_batches)}: give 1 or more")
        if self.run_dir is not None and not (self.run_dir / RECORDS_NAME).is_file():
            raise UserError(
                f"--run-dir {self.run_dir} holds no {RECORDS_NAME}: name a run of scale.py"
            )
        slept = self.sleep_ms
        if slept is not None and (len(slept) != self.pp_size or min(slept) < 0):
            raise UserError(
                f"--sleep-ms {','.join(map(str, slept))} does not give each of {self.pp_size} "
                f"stages a time: name {self.pp_size} numbers of 0 or more"
            )

    @property
    def num_stages(self) -> int:
        """Pipeline stages; raises UserError where they do not divide the ranks."""
        assert self.pp_size is not None
        if World().size % self.pp_size:
            raise UserError(
                f"--pp-size {self.pp_size} does not divide the {World().size} ranks: "
                f"start a multiple of it with --nproc-per-node"
            )
        return self.pp_size


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command on this rank and return its exit code."""
    world = World()
    try:
        options = parse(Options, argv, "launch/bench_pipeline.py", __doc__, speaks=world.rank == 0)
    except UserError as error:
        return refuse_together(world, error)
    return run_ranks(world, lambda ranks: run(options, ranks), lambda: "")


def run(options: Options, ranks: Ranks) -> None:
    """Measure on this rank, and print on the first; raises PeerError where any rank cannot."""
    control = ranks.control
    with control.phase():
        setup = decide_setup(
            probe_machine(),
            local_rank=ranks.world.local_rank,
            local_world_size=ranks.world.local_size,
            threads_per_rank=1,
            device=options.device,
            heads=[options.head],
        )
        model = None
        if options.sleep_ms is None:
            model = options.open(progress=control.is_first)
    index_dir = options.index
    if model is not None and index_dir is None and needs_index(options.head):
        with control.phase():
            built = str(options.index_folder(model)) if control.is_first else ""
        index_dir = Path(control.broadcast(built))
    ranks.open_group(setup.placement.backend, setup.device)
    with compute_threads(setup.threads_per_rank):
        with control.phase():
            pipeline, choose, prompts = _load(options, model, index_dir, setup)
        size = options.batch_size
        results = [
            row
            for count in options.micro_batches
            for row in measure_bubbles(
                pipeline,
                choose,
                [prompts[first : first + size] for first in range(0, count * size, size)],
                new_tokens=options.new_tokens,
                repeats=options.repeats,
            )
        ]
    if control.is_first:
        _report(options, setup, model, results)


def _load(
    options: Options, model: ModelSource | None, index_dir: Path | None, setup: Setup
) -> tuple[PipelineDecoder, Choose, list[list[int]]]:
    """The pipeline of this rank, its head and the prompts."""
    world, dtype, pp_size = World(), DTYPES[options.dtype], options.num_stages
    tp_size = world.size // pp_size
    tokenizer: Any = None

    def load() -> Any:
        nonlocal tokenizer
        if model is None:
            assert options.sleep_ms is not None
            return sleeping_model(pp_size, options.sleep_ms[world.rank // tp_size])
        body, tokenizer = model.load_body(dtype)
        return body

    pipeline = PipelineDecoder(
        load,
        pp_size=pp_size,
        tp_size=tp_size,
        layers_per_stage=options.layers_per_stage,
        device=setup.device,
    )
    head: Head | None = None
    if model is not None and pipeline.is_last:
        head = HeadBuilder(
            tp=pipeline.tp, model=model, index_dir=index_dir, dtype=dtype, device=setup.device
        ).build(options.head)

    def choose(hidden: Tensor, positions: Tensor, sequences: Tensor) -> Tensor:
        return hidden.argmax(1) if head is None else head(hidden).token_ids[:, 0]

    count = max(options.micro_batches) * options.batch_size
    if model is None:
        return pipeline, choose, synthetic_prompts(count, options.prompt_tokens)
    return pipeline, choose, corpus_prompts(tokenizer, count, options.prompt_tokens)


def _report(
    options: Options, setup: Setup, model: ModelSource | None, results: list[dict[str, Any]]
) -> None:
    pp_size, world_size = options.num_stages, World().size
    oversubscribed = setup.fit(world_size).oversubscribed
    what, warning = "stages that sleep: SIMULATED COMPUTE", ""
    if model is not None:
        what = f"{model.name}, {options.head}"
        warning = " OVERSUBSCRIBED: more ranks than cores or GPUs." if oversubscribed else ""
    table = bubble_table(
        results,
        f"{what}, pp {pp_size} x tp {world_size // pp_size} on {setup.device_name}",
        "m micro-batches in flight; ms of a step and idle % by stage; bubbles. "
        f"{options.dtype}, batch {options.batch_size} a micro-batch, "
        f"{options.prompt_tokens} prompt and {options.new_tokens} new tokens, torch "
        f"{torch.__version__}, median of {options.repeats}.{warning}",
    )
    Console().print(table)
    document: dict[str, Any] = {name: str(value) for name, value in values(options).items()}
    document |= {"oversubscribed": oversubscribed, "results": results}
    if options.run_dir is not None:
        write_pipeline(options.run_dir, document)
    if options.json:
        print(json.dumps(document))


if __name__ == "__main__":
    sys.exit(main())
