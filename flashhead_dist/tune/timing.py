"""What a real head takes at a point: only points that the head can run are timed.

A layout decides the time, not what is in it, so an index is laid out with the tree's clusters and
a few hidden states, timed, and thrown away.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashhead_dist.bench.timer import compute_step, step_clock, summarise
from flashhead_dist.heads.base import Head
from flashhead_dist.heads.registry import BASELINE, DEFAULT_HEAD, HeadBuilder
from flashhead_dist.index import build_index
from flashhead_dist.index.options import IndexOptions
from flashhead_dist.models import ModelSource
from flashhead_dist.parallel import TensorParallel
from flashhead_dist.states import HiddenStates
from flashhead_dist.tune.nested import resize
from flashhead_dist.tune.points import Point, Shape, index_options
from flashhead_dist.tune.scene import Scene
from flashhead_kernels.cpu_threads import compute_threads
from flashhead_kernels.timing import time_steps

_WARM_UP = 3
_NUM_STATES = 256


def point_of(record: dict[str, Any]) -> Point:
    """The point that a record describes."""
    return Point(**{field.name: record[field.name] for field in fields(Point)})


def layout_of(record: dict[str, Any], shape: Shape) -> IndexOptions | None:
    """Options of the index that a record needs; None where no head runs it.

    Records with the same options differ in probes, alpha and the number of pinned tokens alone.
    """
    point = point_of(record)
    options = index_options(point, shape.hidden_size, shape.num_groups)
    if options is None:
        return None
    choices = {field.name: getattr(options, field.name) for field in fields(IndexOptions)}
    pinned = point.learned_pins + point.frequent_pins
    # Any tokens take as long as the right ones.
    choices |= {
        "pinned_token_ids": tuple(range(pinned)),
        "learned_pins_per_group": 0,
        "pin_special_tokens": False,
        "alpha": 1.0,
    }
    return IndexOptions(**choices)


def time_points(
    records: Sequence[dict[str, Any]],
    layout: IndexOptions,
    scene: Scene,
    model: ModelSource,
    *,
    batch_sizes: Sequence[int],
    iterations: int,
    threads: int,
    device: str = "cpu",
    on_step: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """Latency of each of `records`, all of `layout`, interleaved with the dense head.

    Returns a dict a record and batch size: `median_us`, `p10_us`, `p90_us`, `dense_median_us` of
    the same rounds, `times_dense`, and the batch size.
    """
    vectors = scene.vectors
    slots = resize(scene.slots, vectors, layout.cluster_size)
    taken = torch.isin(slots, torch.tensor(layout.pinned_token_ids, dtype=slots.dtype))
    with tempfile.TemporaryDirectory(prefix="flashhead-tune-") as scratch:
        folder = build_index(
            model,
            layout,
            calibration=_some(scene.states),
            test=None,
            out=Path(scratch) / "index",
            device=device,
            progress=False,
            clusters=(slots.masked_fill(taken, -1), 0),
        )
        builder = HeadBuilder(
            tp=TensorParallel.single(device), model=model, index_dir=folder, device=device
        )
        heads: list[Head] = [builder.build(BASELINE)]
        for record in records:
            probes = record["probes_per_group"] * scene.num_groups
            heads.append(builder.build(DEFAULT_HEAD, num_probes=probes, alpha=record["alpha"]))
    results = []
    with compute_threads(threads):
        for size in batch_sizes:
            results += _time(heads, scene.states.to(model.dtype), size, iterations, device)
            on_step()
    return results


def _some(states: Tensor) -> HiddenStates:
    """A few of `states`, of no source in particular."""
    few = states[:: -(-len(states) // _NUM_STATES)]
    nowhere = torch.zeros(len(few), dtype=torch.int64)
    return HiddenStates(few, nowhere, ("all",), "some states, for a layout to be timed")


def _time(
    heads: Sequence[Head], states: Tensor, batch_size: int, iterations: int, device: str
) -> list[dict[str, Any]]:
    """Latencies of all heads but the first, beside the first's."""
    batches = [batch.to(device) for batch in torch.split(states, batch_size)[: iterations + 1]]
    clock = step_clock(torch.device(device))
    steps = {str(place): compute_step(head, batches, clock) for place, head in enumerate(heads)}
    time_steps(steps, _WARM_UP)
    times = time_steps(steps, iterations)
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
