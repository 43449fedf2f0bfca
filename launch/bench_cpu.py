"""Time one rank's head on a CPU: ours beside dense heads and the published scheme's operations.

    python launch/bench_cpu.py           one thread, batch 1, the default model and its index
    python launch/bench_cpu.py --batch-sizes 1,4,16 --threads 2 --json
    python launch/bench_cpu.py --synthetic 32768,256 --iters 5         a made-up model, in seconds
    python launch/bench_cpu.py --draws                                draws at temperature 1 as well

Four ways to the greedy token, interleaved iteration by iteration on the same hidden states, so that
whatever else the machine does falls on all of them; each iteration takes another state. Dense reads
the whole embedding, so no head finds its weights in a cache. The median and p10 to p90 are printed,
and ratios of medians.

    flashhead          this project's head at tp_size 1, as the index is stored
    dense_local_max    this project's dense head: one fused scan of the rows
    dense torch        torch.nn.functional.linear and max, in the rows' dtype
    published, eager   FlashHead as published (arXiv 2603.14591): C = V/16 unit-norm centroids in
                       the rows' dtype, top p over all, gather of their rows, product, argmax

The published scheme's clusters are here four neighbouring clusters of our index, which has the same
sizes and so the same time; its fidelity is measured in docs/decisions on an index of its own.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from flashhead_dist.errors import INTERRUPTED, UserError
from flashhead_dist.evaluate.workload import Request, prepare_workload
from flashhead_dist.heads.base import Head
from flashhead_dist.heads.dense import DenseLocalMax
from flashhead_dist.heads.flashhead import FlashHead
from flashhead_dist.heads.registry import HeadBuilder
from flashhead_dist.heads.sampling import SamplingParameters, choose_tokens
from flashhead_dist.parallel import TensorParallel
from flashhead_kernels.cpu_threads import compute_threads, empty_on_large_pages
from flashhead_kernels.shard import IndexShard
from flashhead_topology.probe import probe_machine

_PUBLISHED_CLUSTER_SIZE = 16
Step = Callable[[Tensor], Tensor]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="HF folder, .gguf file or hub id (default: built in)")
    parser.add_argument("--synthetic", metavar="V,D", help="a made-up embedding, marked as such")
    parser.add_argument("--index", type=Path, metavar="DIR", help="default: the model's, cached")
    parser.add_argument("--hidden-states", type=Path, metavar="FILE")
    parser.add_argument("--threads", type=int, default=1, metavar="N")
    parser.add_argument("--batch-sizes", type=_integers, default=[1], metavar="N,N")
    parser.add_argument("--iters", type=int, default=60, metavar="N")
    parser.add_argument("--num-probes", type=int, metavar="P", help="default: the index's")
    parser.add_argument("--published-probes", type=int, default=1024, metavar="P")
    parser.add_argument("--draws", action="store_true", help="also time draws at temperature 1")
    parser.add_argument("--json", action="store_true", help="one JSON document as the last line")
    return parser


def _integers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


_integers.__name__ = "comma-separated integers"  # argparse names it so where it fails


def check(arguments: argparse.Namespace) -> None:
    """Refuse what is wrong whatever the model; raises UserError."""
    given = {f"--{name}": getattr(arguments, name) for name in ("iters", "threads")}
    given["--batch-sizes"] = min(arguments.batch_sizes)
    given["--published-probes"] = arguments.published_probes
    for flag, value in given.items():
        if value < 1:
            raise UserError(f"{flag} holds {value}: give 1 or more")


def published_scheme(shard: IndexShard, num_probes: int) -> Step:
    """FlashHead's published operations, in eager torch; `[B, D]` to token ids `[B]`.

    Raises:
        UserError: more probes than clusters.
    """
    # Tree order: cluster t is slot t // G of group t % G.
    rows = shard.rows.transpose(0, 1).reshape(-1, shard.rows.shape[-1])
    ids = shard.token_ids.transpose(0, 1).reshape(-1)
    usable = len(ids) - len(ids) % _PUBLISHED_CLUSTER_SIZE
    shape = (usable // _PUBLISHED_CLUSTER_SIZE, _PUBLISHED_CLUSTER_SIZE, rows.shape[-1])
    clusters = empty_on_large_pages(shape, rows.dtype)
    clusters.view(usable, -1).copy_(rows[:usable])
    token_ids = ids[:usable].view(-1, _PUBLISHED_CLUSTER_SIZE)
    centroids = torch.nn.functional.normalize(clusters.float().mean(1), dim=1).to(rows.dtype)
    flat = clusters.view(len(clusters), -1)
    if num_probes > len(clusters):
        raise UserError(
            f"--published-probes is {num_probes}, more than the {len(clusters)} clusters of "
            f"{_PUBLISHED_CLUSTER_SIZE}: give {len(clusters)} or less"
        )

    def step(hidden_states: Tensor) -> Tensor:
        batch = len(hidden_states)
        scores = torch.nn.functional.linear(hidden_states, centroids)
        probes = scores.topk(num_probes, dim=1, sorted=False).indices
        chosen = flat.index_select(0, probes.flatten()).view(batch, -1, rows.shape[-1])
        logits = torch.bmm(chosen, hidden_states.unsqueeze(2)).squeeze(2)
        best = logits.argmax(1)
        cluster = probes.gather(1, (best // _PUBLISHED_CLUSTER_SIZE).unsqueeze(1))
        return token_ids[cluster.squeeze(1), best % _PUBLISHED_CLUSTER_SIZE]

    return step


def draws(flashhead: FlashHead, dense: DenseLocalMax) -> dict[str, Step]:
    """Ways to draw a token at temperature 1; see `heads.sampling`."""
    drawn = SamplingParameters(temperature=1.0)
    ways = {
        "flashhead, drawn": (flashhead, drawn),
        "flashhead, top-k 50": (flashhead, replace(drawn, top_k=50)),
        "flashhead, top-p 0.95": (flashhead, replace(drawn, top_p=0.95)),
        "dense_local_max, drawn": (dense, drawn),
    }

    def step(head: Head, parameters: SamplingParameters) -> Step:
        def draw(states: Tensor) -> Tensor:
            numbers = torch.arange(len(states))
            return choose_tokens(head, states, numbers, numbers, parameters)

        return draw

    return {name: step(*way) for name, way in ways.items()}


def make_steps(arguments: argparse.Namespace) -> tuple[dict[str, Step], Tensor, dict[str, Any]]:
    """The ways by name, the hidden states `[N, D]`, and what they are made from."""
    request = Request(
        heads=["flashhead", "dense_local_max"],
        model=arguments.model,
        synthetic=arguments.synthetic,
        index=arguments.index,
        hidden_states=arguments.hidden_states,
        max_states=0,
    )
    workload = prepare_workload(request, 1, progress=True)
    model = request.open_model(progress=False)
    builder = HeadBuilder(tp=TensorParallel.single(), model=model, index_dir=workload.index_dir)
    flashhead = builder.build("flashhead", num_probes=arguments.num_probes)
    dense = builder.build("dense_local_max")
    assert isinstance(flashhead, FlashHead)
    assert isinstance(dense, DenseLocalMax)
    rows = dense.weight
    steps: dict[str, Step] = {
        "flashhead": lambda states: flashhead(states).token_ids,
        "dense_local_max": lambda states: dense(states).token_ids,
        "dense torch": lambda states: torch.nn.functional.linear(states, rows).max(1).indices,
        "published, eager": published_scheme(flashhead.shard, arguments.published_probes),
    }
    if arguments.draws:
        steps |= draws(flashhead, dense)
    made_from = {
        "model": model.name,
        "synthetic": model.synthetic,
        "index": str(workload.index_dir),
        "num_probes": flashhead.num_probes,
        "hidden_states": workload.origin,
    }
    return steps, workload.states.to(rows.dtype), made_from


def measure(steps: dict[str, Step], states: Tensor, batch_size: int, iters: int) -> pd.DataFrame:
    """Microseconds, one row an iteration and one column a way."""
    if batch_size > len(states):
        raise UserError(
            f"--batch-sizes holds {batch_size}, more than the {len(states)} hidden states: give "
            f"more states with --hidden-states, or a smaller batch"
        )
    times: list[dict[str, float]] = []
    for iteration in track(range(-3, iters), f"batch {batch_size}", console=Console(stderr=True)):
        first = (iteration % (len(states) // batch_size)) * batch_size
        batch = states[first : first + batch_size]
        row = {}
        for name, step in steps.items():
            start_s = time.perf_counter()
            step(batch)
            row[name] = (time.perf_counter() - start_s) * 1e6
        if iteration >= 0:
            times.append(row)
    return pd.DataFrame(times)


def summarise(times: pd.DataFrame, batch_size: int) -> pd.DataFrame:
    """Median, p10, p90 in microseconds and the ratio to flashhead's median, one row a way."""
    summary = times.quantile([0.5, 0.1, 0.9]).T
    summary.columns = pd.Index(["median_us", "p10_us", "p90_us"])
    summary["times_flashhead"] = summary["median_us"] / times["flashhead"].median()
    summary.insert(0, "batch_size", batch_size)
    return summary.rename_axis("head").reset_index()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return an exit code."""
    arguments = _parser().parse_args(argv)
    machine = probe_machine()
    try:
        check(arguments)
        with compute_threads(machine.num_cores):
            steps, states, made_from = make_steps(arguments)
        with compute_threads(arguments.threads):
            results = pd.concat(
                summarise(measure(steps, states, size, arguments.iters), size)
                for size in arguments.batch_sizes
            )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\nerror: interrupted.", file=sys.stderr)
        return INTERRUPTED
    title = f"{machine.cpu_model}, {arguments.threads} thread(s), torch {torch.__version__}"
    made_up = " (SYNTHETIC)" if made_from["synthetic"] else ""
    table = Table(
        title=f"{made_from['model']}{made_up} on {title}",
        caption=f"{arguments.iters} iterations each, interleaved; flashhead probes "
        f"{made_from['num_probes']:,} clusters, the published scheme "
        f"{arguments.published_probes:,} of {_PUBLISHED_CLUSTER_SIZE} tokens",
        caption_justify="left",
    )
    table.add_column("head", no_wrap=True)
    for column in ("batch", "median us", "p10 to p90 us", "times flashhead"):
        table.add_column(column, justify="right")
    for row in results.to_dict("records"):
        table.add_row(
            row["head"],
            str(row["batch_size"]),
            f"{row['median_us']:,.0f}",
            f"{row['p10_us']:,.0f} to {row['p90_us']:,.0f}",
            f"{row['times_flashhead']:.2f}",
        )
    Console().print(table)
    if arguments.json:
        document = {
            "machine": title,
            **made_from,
            "threads": arguments.threads,
            "published_probes": arguments.published_probes,
            "iterations": arguments.iters,
            "results": results.to_dict("records"),
        }
        print(json.dumps(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
