"""How well pipeline stages overlap: measured idle time of each, beside what theory allows.

    torchrun --nproc-per-node 2 launch/bench_pipeline.py              2 stages, the default model
    torchrun --nproc-per-node 4 launch/bench_pipeline.py --pp-size 2 --micro-batches 1,2,4 --json
    torchrun --nproc-per-node 2 launch/bench_pipeline.py --layers-per-stage 11,7
    torchrun --nproc-per-node 4 launch/bench_pipeline.py --sleep-ms 50,50,50,50

Decodes the same prompts, cut to one length, in 1, 2, ... micro-batches in flight, by two schedules,
interleaved: *continuous*, a micro-batch goes on as soon as its token is back; *flushed*, each step
of all micro-batches ends before the next begins, as in DeepSpeed's own engine. For each the median
run is shown: tokens a second; each stage's idle share; their mean, the measured bubble; what equal
stages would have by formula, (p-1)/(m+p-1) where flushed; and what the measured compute times of
these stages would have if messages took no time (docs/pipeline.md).

Each rank needs a core or a GPU of its own: with fewer, stages wait for each other's cores, the
shares mean nothing, and the table says so. With --sleep-ms the stages are made up: each sleeps that
long instead of computing, so that schedule and messages are measured alone, with any number of
stages on any machine; such a table says SIMULATED COMPUTE. Exit codes: as of launch/scale.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
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
from flashhead_dist.heads.registry import HEADS, HeadBuilder, check_head_names, needs_index
from flashhead_dist.index import ensure_index
from flashhead_dist.integrations.pipeline import PipelineDecoder
from flashhead_dist.integrations.pipeline_bubble import (
    continuous_bubble,
    flushed_bubble,
    ideal_bubble,
    measured_bubble,
)
from flashhead_dist.models import ModelSource, open_model
from flashhead_kernels.cpu_threads import compute_threads
from flashhead_topology.probe import probe_machine
from pipeline_inputs import corpus_prompts, made_up_prompts, sleeping_model
from rank_parser import DTYPES, integers
from ranks import Ranks, World, refuse_together, run_ranks

_SCHEDULES = {"continuous": False, "flushed": True}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--pp-size", type=int, metavar="P", help="stages (default: all ranks)")
    parser.add_argument("--layers-per-stage", type=integers, metavar="N,N", help="default: even")
    parser.add_argument("--micro-batches", type=integers, default=[1, 2, 4], metavar="N,N")
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="of each of them")
    parser.add_argument("--model", help="HF folder, .gguf file or hub id (default: built in)")
    parser.add_argument("--head", default="flashhead", help=f"one of {', '.join(HEADS)}")
    parser.add_argument("--index", type=Path, metavar="DIR", help="default: the model's, cached")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="fp32")
    parser.add_argument("--prompt-tokens", type=int, default=16, metavar="N")
    parser.add_argument("--new-tokens", type=int, default=32, metavar="N")
    parser.add_argument("--repeats", type=int, default=3, metavar="N")
    parser.add_argument("--sleep-ms", type=integers, metavar="N,N", help="simulate; by stage")
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument(
        "--run-dir",
        type=Path,
        metavar="DIR",
        help="a folder of launch/scale.py, whose report then shows the bubbles too",
    )
    parser.add_argument("--json", action="store_true", help="one JSON document as the last line")
    return parser


def check(arguments: argparse.Namespace) -> None:
    """Refuse what is wrong whatever the model; raises UserError."""
    check_head_names([arguments.head])
    given = {"--micro-batches": min(arguments.micro_batches)}
    for name in ("batch-size", "prompt-tokens", "new-tokens", "repeats"):
        given[f"--{name}"] = getattr(arguments, name.replace("-", "_"))
    for flag, value in given.items():
        if value < 1:
            raise UserError(f"{flag} holds {value}: give 1 or more")
    folder = arguments.run_dir
    if folder is not None and not (folder / RECORDS_NAME).is_file():
        raise UserError(f"--run-dir {folder} holds no {RECORDS_NAME}: name a run of scale.py")
    slept = arguments.sleep_ms
    if slept is not None and (len(slept) != arguments.pp_size or min(slept) < 0):
        raise UserError(
            f"--sleep-ms {','.join(map(str, slept))} does not give each of {arguments.pp_size} "
            f"stages a time: name {arguments.pp_size} numbers of 0 or more"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command on this rank and return its exit code."""
    world = World()
    arguments = _parser().parse_args(argv)
    arguments.pp_size = arguments.pp_size or world.size
    try:
        check(arguments)
    except UserError as error:
        return refuse_together(world, error)
    return run_ranks(world, lambda ranks: run(arguments, ranks), lambda: "")


def run(arguments: argparse.Namespace, ranks: Ranks) -> None:
    """Measure on this rank, and print on the first; raises PeerError where any rank cannot."""
    world, control = ranks.world, ranks.control
    with control.phase():
        setup = decide_setup(
            probe_machine(),
            local_rank=world.local_rank,
            local_world_size=world.local_size,
            threads_per_rank=1,
            device=arguments.device,
            heads=[arguments.head],
        )
        model = None
        if arguments.sleep_ms is None:
            model = open_model(arguments.model, progress=control.is_first)
    index_dir = arguments.index
    if model is not None and index_dir is None and needs_index(arguments.head):
        with control.phase():
            found = str(ensure_index(model)) if control.is_first else ""
        index_dir = Path(control.broadcast(found))
    ranks.open_group(setup.placement.backend, setup.device)
    with compute_threads(setup.threads_per_rank):
        with control.phase():
            decode = _Decode(arguments, model, index_dir, setup)
        results = [
            decode.summary(num_micro_batches, schedule)
            for num_micro_batches in arguments.micro_batches
            for schedule in decode.measure(num_micro_batches)
        ]
    if control.is_first:
        _report(arguments, setup, model, world.size, results)


class _Decode:
    """The decoder of this rank, its head and its prompts."""

    def __init__(
        self,
        arguments: argparse.Namespace,
        model: ModelSource | None,
        index_dir: Path | None,
        setup: Setup,
    ) -> None:
        self.arguments = arguments
        dtype = DTYPES[arguments.dtype]
        tokenizer: Any = None

        world = World()
        if world.size % arguments.pp_size:
            raise UserError(
                f"--pp-size {arguments.pp_size} does not divide the {world.size} ranks: "
                f"start a multiple of it with --nproc-per-node"
            )
        tp_size = world.size // arguments.pp_size

        def load() -> Any:
            nonlocal tokenizer
            if model is None:
                return sleeping_model(arguments.pp_size, arguments.sleep_ms[world.rank // tp_size])
            body, tokenizer = model.load_body(dtype)
            return body

        self.pipeline = PipelineDecoder(
            load,
            pp_size=arguments.pp_size,
            tp_size=tp_size,
            layers_per_stage=arguments.layers_per_stage,
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
            self.head = builder.build(arguments.head)
        count = max(arguments.micro_batches) * arguments.batch_size
        if model is None:
            self.prompts = made_up_prompts(count, arguments.prompt_tokens)
        else:
            self.prompts = corpus_prompts(tokenizer, count, arguments.prompt_tokens)
        self.runs: dict[tuple[int, str], list[dict[str, Any]]] = {}

    def measure(self, num_micro_batches: int) -> list[str]:
        """Run both schedules in turn, after one run to warm up; the names of the schedules."""
        for repeat in range(-1, self.arguments.repeats):
            for schedule, flushed in _SCHEDULES.items():
                run = self._run(num_micro_batches, flushed)
                if repeat >= 0:
                    self.runs.setdefault((num_micro_batches, schedule), []).append(run)
        return list(_SCHEDULES)

    def _run(self, num_micro_batches: int, flushed: bool) -> dict[str, Any]:
        size = self.arguments.batch_size
        states = [
            DecodeState(
                self.prompts[number * size : (number + 1) * size],
                max_new_tokens=self.arguments.new_tokens,
            )
            for number in range(num_micro_batches)
        ]
        _, stages = self.pipeline.decode(states, self._choose, flushed=flushed)
        total_s = max(stage.total_s for stage in stages)
        return {
            "tokens_per_s": num_micro_batches * size * self.arguments.new_tokens / total_s,
            "stage_idle_shares": [stage.idle_share for stage in stages],
            "stage_step_ms": [1e3 * median(stage.compute_s) for stage in stages],
            "measured_bubble": measured_bubble(stages),
            "ideal_bubble": ideal_bubble(stages, flushed=flushed),
        }

    def _choose(self, hidden: Tensor, positions: Tensor, sequences: Tensor) -> Tensor:
        return hidden.argmax(1) if self.head is None else self.head(hidden).token_ids[:, 0]

    def summary(self, num_micro_batches: int, schedule: str) -> dict[str, Any]:
        """The run of median bubble, with what equal stages would have."""
        runs = sorted(
            self.runs[num_micro_batches, schedule], key=lambda run: float(run["measured_bubble"])
        )
        pp_size, steps = self.arguments.pp_size, self.arguments.new_tokens
        formula = (
            flushed_bubble(pp_size, num_micro_batches)
            if _SCHEDULES[schedule]
            else continuous_bubble(pp_size, num_micro_batches, steps)
        )
        found = {"micro_batches": num_micro_batches, "schedule": schedule}
        return found | {"formula_bubble": formula} | runs[len(runs) // 2]


def _report(
    arguments: argparse.Namespace,
    setup: Setup,
    model: ModelSource | None,
    world_size: int,
    results: list[dict[str, Any]],
) -> None:
    tp_size = world_size // arguments.pp_size
    oversubscribed = setup.fit(world_size).oversubscribed
    what, warning = "stages that sleep: SIMULATED COMPUTE", ""
    if model is not None:
        what = f"{model.name}, {arguments.head}"
        warning = " OVERSUBSCRIBED: more ranks than cores or GPUs." if oversubscribed else ""
    table = Table(
        title=f"{what}, pp {arguments.pp_size} x tp {tp_size} on {setup.device_name}",
        caption="m micro-batches in flight; ms of a step and idle % by stage; bubbles. "
        f"{arguments.dtype}, batch {arguments.batch_size} a micro-batch, "
        f"{arguments.prompt_tokens} prompt and {arguments.new_tokens} new tokens, torch "
        f"{torch.__version__}, median of {arguments.repeats}.{warning}",
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
    given = {name: str(value) for name, value in vars(arguments).items()}
    document = given | {"oversubscribed": oversubscribed, "results": results}
    if arguments.run_dir is not None:
        write_pipeline(arguments.run_dir, document)
    if arguments.json:
        print(json.dumps(document))


if __name__ == "__main__":
    sys.exit(main())
