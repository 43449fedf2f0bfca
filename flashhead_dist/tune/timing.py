"""Latency of settings that the head can run, beside the dense head.

The layout of an index determines the time, not its contents. So an index is laid out with the
tree's clusters and a few hidden states, timed, and deleted.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashhead_dist.bench.timer import compute_step, step_clock, summarise
from flashhead_dist.heads.base import Head
from flashhead_dist.heads.registry import BASELINE, DEFAULT_HEAD, HeadBuilder
from flashhead_dist.index.build import BuildInputs, build_from
from flashhead_dist.index.options import IndexOptions
from flashhead_dist.models import ModelSource
from flashhead_dist.parallel import TensorParallel
from flashhead_dist.states import HiddenStates
from flashhead_dist.tune.front import Record
from flashhead_dist.tune.run import Journal
from flashhead_dist.tune.settings import Setting, Shape
from flashhead_dist.tune.simulate import TuningData
from flashhead_kernels.cpu_threads import compute_threads
from flashhead_kernels.timing import time_steps

_WARM_UP = 3
_NUM_STATES = 256


@dataclass(frozen=True)
class TimingPlan:
    """How settings are timed: `iterations` steps each, interleaved, by `threads` on `device`."""

    batch_sizes: list[int]
    iterations: int
    threads: int
    device: str = "cpu"


def layout_of(record: Record, shape: Shape) -> IndexOptions | None:
    """Options of the index that a record needs; None where no head runs it.

    Records with the same options differ in probes, alpha and the number of pinned tokens only.
    """
    setting = Setting.of_record(record)
    if setting.row_bits != 16:
        return None
    return setting.index_options(
        shape,
        # Any tokens take as long as the right ones.
        pinned_token_ids=tuple(range(setting.learned_pins + setting.frequent_pins)),
        learned_pins_per_group=0,
        pin_special_tokens=False,
        alpha=1.0,
    )


def time_front(
    front: Sequence[Record],
    data: TuningData,
    model: ModelSource,
    journal: Journal,
    plan: TimingPlan,
    on_layout: Callable[[str], None] = lambda name: None,
) -> list[Record]:
    """`front` once per batch size, with latencies where a real head runs the setting.

    Others have `measured` false and no time.
    """
    by_layout: dict[IndexOptions, list[Record]] = defaultdict(list)
    timed: list[Record] = []
    for record in front:
        layout = layout_of(record, data.shape)
        if layout is None:
            timed += [record | {"batch_size": b, "measured": False} for b in plan.batch_sizes]
        else:
            by_layout[layout].append(record)
    for layout, records in by_layout.items():
        on_layout(records[0]["family"])
        probed = [(record["probes_per_group"], record["alpha"]) for record in records]
        name = f"times {layout.fingerprint()} {probed} {astuple(plan)}"
        if name not in journal:
            journal.add(name, time_layout(records, layout, data, model, plan))
        repeated = [record for _ in plan.batch_sizes for record in records]
        timed += [
            record | time | {"measured": True}
            for record, time in zip(repeated, journal[name], strict=True)
        ]
    return sorted(timed, key=lambda r: (r["batch_size"], r["bytes_share"]))


def time_layout(
    records: Sequence[Record],
    layout: IndexOptions,
    data: TuningData,
    model: ModelSource,
    plan: TimingPlan,
) -> list[dict[str, Any]]:
    """Latency of each of `records`, all of `layout`, interleaved with the dense head.

    Returns a dict per batch size and record: `batch_size`, `median_us`, `p10_us`, `p90_us`,
    `dense_median_us` of the same rounds, and `times_dense`.
    """
    with tempfile.TemporaryDirectory(prefix="flashhead-tune-") as scratch:
        folder = build_from(
            model,
            layout,
            BuildInputs(_few(data.states), clusters=(data.clusters(layout), 0)),
            Path(scratch) / "index",
            device=plan.device,
            progress=False,
        )
        builder = HeadBuilder(
            tp=TensorParallel.single(plan.device),
            model=model,
            index_dir=folder,
            device=plan.device,
        )
        heads: list[Head] = [builder.build(BASELINE)]
        for record in records:
            probes = record["probes_per_group"] * data.num_groups
            heads.append(builder.build(DEFAULT_HEAD, num_probes=probes, alpha=record["alpha"]))
    results = []
    with compute_threads(plan.threads):
        for size in plan.batch_sizes:
            results += _time(heads, data.states.to(model.dtype), size, plan)
    return results


def _few(states: Tensor) -> HiddenStates:
    """A few of `states`, of no source in particular."""
    few = states[:: -(-len(states) // _NUM_STATES)]
    source_ids = torch.zeros(len(few), dtype=torch.int64)
    return HiddenStates(few, source_ids, ("all",), "a few states, to lay out an index for timing")


def _time(
    heads: Sequence[Head], states: Tensor, batch_size: int, plan: TimingPlan
) -> list[dict[str, Any]]:
    """Latencies of all heads but the first, beside the first's."""
    batches = torch.split(states, batch_size)[: plan.iterations + 1]
    on_device = [batch.to(plan.device) for batch in batches]
    clock = step_clock(torch.device(plan.device))
    steps = {str(n): compute_step(head, on_device, clock) for n, head in enumerate(heads)}
    time_steps(steps, _WARM_UP)
    times = time_steps(steps, plan.iterations)
    latencies = [summarise([times[name]]) for name in steps]
    dense = latencies[0].median_us
    return [
        {
            "batch_size": batch_size,
            "median_us": latency.median_us,
            "p10_us": latency.p10_us,
            "p90_us": latency.p90_us,
            "dense_median_us": dense,
            "times_dense": dense / latency.median_us,
        }
        for latency in latencies[1:]
    ]
