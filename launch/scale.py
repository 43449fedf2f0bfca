"""What each output head costs at each tensor-parallel size on this machine.

    torchrun --nproc-per-node 8 launch/scale.py                    the default model and heads
    torchrun --nproc-per-node 2 launch/scale.py --model DIR --batch-sizes 1,8 --heads all
    torchrun --nproc-per-node 2 launch/scale.py --synthetic 32000,1024 --iters 5 --json
    python launch/scale.py --heads flashhead,dense_local_max       one rank

Sweeps groups of the first 1, 2, 4, ... ranks. Uses NCCL and CUDA where every rank has a GPU of its
own, else gloo and the CPU. More ranks than cores are OVERSUBSCRIBED: every table and plot says so,
each rank's compute is measured in isolation, and what follows from it is labelled a projection.

Without --index the model's default index is used, and built first where it is missing. Writes
records.jsonl, summary.csv, environment.json, plots and report/report.html (see launch/report.py) to
RUNS_DIR/<date>_<host class>_<commit>/ and prints a summary; --verbose prints all tables.
docs/concepts/measurement.md says how everything is measured and what each key means.

Exit codes of a rank: 0, 2 for a mistake in the options, 1 where another rank failed, 130 after
Ctrl-C. torchrun reports them, and itself exits with 1 for any but 0.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from flashhead_dist.bench.cell import Effort
from flashhead_dist.bench.run import Run, RunOptions
from flashhead_dist.errors import UserError
from flashhead_dist.evaluate.workload import Request
from flashhead_dist.heads.registry import HEADS
from flashhead_dist.report.terminal import report_run
from options import (
    DTYPES,
    Checked,
    Device,
    DType,
    EscalationOptions,
    Folder,
    Integers,
    JsonOutput,
    ModelWithStates,
    Names,
    NonNegative,
    Number,
    Positive,
    Range,
    Seconds,
    Switch,
    head_names,
    parse,
    values,
)
from ranks import Ranks, World, refuse_together, run_ranks


@dataclass(kw_only=True)
class What(ModelWithStates, EscalationOptions):
    """What to measure."""

    heads: Names[list[str] | None] = None
    """all, or some names (default: dense_gather, dense_local_max, flashhead)"""
    tp_sizes: Integers[list[int] | None] = None
    """tensor-parallel sizes (default: 1, 2, 4, ... and all ranks)"""
    batch_sizes: Integers[list[int]] = field(default_factory=lambda: [1, 4, 16])
    """rows of a step"""
    dtype: DType[str | None] = None
    """of the rows (default: as stored)"""
    num_probes: Positive[int | None] = None
    """probed clusters (default: the index's)"""
    alpha: Number[float | None] = None
    """weight of a cluster's spread (default: the index's)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads == ["all"]:
            self.heads = list(HEADS)
        elif self.heads is not None:
            self.heads = head_names(self.heads)
        if min(self.batch_sizes) < 1:
            raise UserError(f"--batch-sizes holds {min(self.batch_sizes)}: give 1 or more")
        self.batch_sizes = sorted(set(self.batch_sizes))


@dataclass(kw_only=True)
class How(Checked):
    """How to measure."""

    iters: Positive[int] = 40
    """rounds of a cell at most; it ends once every median is known to 2 %"""
    warmup: NonNegative[int] = 3
    """rounds before"""
    cell_seconds: Seconds[float] = 12.0
    """time for the rounds of a cell at most"""
    max_states: NonNegative[int] = 1024
    """test states for agreement; 0 leaves it out"""
    threads_per_rank: Positive[int] = 1
    """the same at every tp size"""
    remeasure: Switch = False
    """measure again what other runs chose by measuring: where flashhead_auto scans, and the
    launches of CUDA kernels"""
    device: Device[str | None] = None
    """cpu or cuda (default: cuda with a GPU a rank)"""
    seed: Annotated[NonNegative[int], Range(0, 2**63 - 1)] = 0
    """of synthetic hidden states"""


@dataclass(kw_only=True)
class Output(JsonOutput):
    """What to write."""

    runs_dir: Folder[Path] = Path("runs")
    """folder of all runs"""
    skip_plots: Switch = False
    """draw no plots and no page"""
    verbose: Switch = False
    """print every table"""


@dataclass(kw_only=True)
class ScaleOptions:
    what: What
    how: How
    output: Output

    def run_options(self, num_ranks: int) -> RunOptions:
        """Raises UserError for what is wrong whatever the model."""
        what, how = self.what, self.how
        powers = [2**i for i in range(num_ranks.bit_length()) if 2**i < num_ranks]
        tp_sizes = sorted(set(what.tp_sizes or [*powers, num_ranks]))
        for tp_size in tp_sizes:
            if not 1 <= tp_size <= num_ranks:
                raise UserError(
                    f"tp size {tp_size} does not lie between 1 and the {num_ranks} ranks started: "
                    f"start more with torchrun --nproc-per-node, or change --tp-sizes"
                )
        return RunOptions(
            request=Request(
                heads=tuple(what.heads or ()),
                model=what.model,
                synthetic=what.synthetic,
                dtype=DTYPES[what.dtype] if what.dtype else None,
                index=what.index,
                hidden_states=what.hidden_states,
                max_states=how.max_states,
                seed=how.seed,
            ),
            tp_sizes=tp_sizes,
            batch_sizes=what.batch_sizes,
            num_probes=what.num_probes,
            alpha=what.alpha,
            escalation=what.threshold(what.heads),
            effort=Effort(iterations=how.iters, warmup=how.warmup, cell_seconds=how.cell_seconds),
            threads_per_rank=how.threads_per_rank,
            device=how.device,
            remeasure=how.remeasure,
            runs_dir=self.output.runs_dir,
            plots=not self.output.skip_plots,
            given={name: str(value) for name, value in values(self).items()},
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command on this rank and return its exit code."""
    world = World()
    try:
        given = parse(ScaleOptions, argv, "launch/scale.py", __doc__, speaks=world.rank == 0)
        run = Run(given.run_options(world.size), world.size)
    except UserError as error:
        return refuse_together(world, error)

    def work(ranks: Ranks) -> None:
        run.measure(ranks.control, ranks.open_group, world.local_rank, world.local_size)
        with ranks.control.phase():
            if world.rank == 0:
                report_run(run, verbose=given.output.verbose, as_json=given.output.json)

    return run_ranks(world, work, run.parting_words)


if __name__ == "__main__":
    sys.exit(main())
