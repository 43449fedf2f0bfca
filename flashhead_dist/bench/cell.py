"""One cell of the sweep: every head at one `tp_size` and batch size, on the ranks of one group.

Where the ranks fit the machine, a latency is what the clock saw. Where they are oversubscribed, the
clock sees ranks taking turns; then each rank's compute is measured again alone, one rank after the
other, and the communication is taken from the cost model of `projection`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from flashhead_dist.bench.alone import Recording, alone_step, record_step
from flashhead_dist.bench.control import Control
from flashhead_dist.bench.device_counts import ON_CPU, DeviceCount, count_on_devices
from flashhead_dist.bench.graph import can_capture, graphed_step
from flashhead_dist.bench.memory import workspace_bytes
from flashhead_dist.bench.projection import ExchangeCost, projected_communication_us
from flashhead_dist.bench.split import RankParts, StepSplit
from flashhead_dist.bench.split_timing import (
    alone_work,
    split_over_ranks,
    time_parts,
    together_work,
)
from flashhead_dist.bench.timing import (
    HostClock,
    Latency,
    RankTimes,
    Step,
    forward_step,
    step_clock,
    summarise,
    time_interleaved,
)
from flashhead_dist.bench.wire import WireCounter
from flashhead_dist.heads.base import Head
from flashhead_dist.parallel import Operation
from flashhead_profiles.counters import CountedBytes
from flashhead_profiles.ranges import CAPTURE, annotate

MIN_ITERATIONS = 3
_NUM_ALONE_BATCHES = 4
_BURST_S = 0.06
_MAX_BURST_STEPS = 40
_NUM_BURSTS = 5


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How long to measure a cell: at most `iterations` rounds, and about `cell_seconds`."""

    iterations: int = 40
    warmup: int = 3
    cell_seconds: float = 15.0


@dataclass(frozen=True, kw_only=True)
class HeadCell:
    """What one cell says of one head. Bytes are of one step, over the batch's rows.

    wall: what the clock saw with all ranks at work.
    alone: where oversubscribed, compute of ranks that ran alone; its communication is 0.
    projected_communication_us: where oversubscribed and the model is known.
    payload_bytes, sent_bytes: analytic, of one rank, as `collectives` defines them.
    counted: by the interface, all ranks together; None at `tp_size` 1.
    split: where the time goes, from rounds of their own, alone where `alone` is.
    read_bytes_by_rank: weights that each rank reads in a step, analytic.
    workspace_bytes: of the rank that needs most, see `memory.workspace_bytes`; None on a CPU.
    device_counts: what the ranks' GPUs counted; empty for a `device_counts_reason`.
    """

    wall: Latency
    alone: Latency | None
    projected_communication_us: float | None
    num_collectives: int
    payload_bytes: float
    sent_bytes: float
    counted: CountedBytes | None
    split: StepSplit
    read_bytes_by_rank: tuple[int, ...]
    workspace_bytes: int | None = None
    device_counts: tuple[DeviceCount, ...] = ()
    device_counts_reason: str | None = ON_CPU


def measure_cell(
    heads: Mapping[str, Head],
    batches: Sequence[Tensor],
    *,
    control: Control,
    wire: WireCounter | None,
    effort: Effort,
    oversubscribed: bool,
    costs: Mapping[Operation, ExchangeCost],
) -> dict[str, HeadCell]:
    """Measure `heads` on `batches`, each `[B, D]`; every rank of the group calls it.

    Returns:
        The same on every rank, but for the analytic bytes, which are this rank's.
    """
    any_head = next(iter(heads.values()))
    num_recordings = _NUM_ALONE_BATCHES if oversubscribed else 0
    recordings = {
        name: [record_step(head, batch) for batch in batches[:num_recordings]]
        for name, head in heads.items()
    }
    device = any_head.tp.device
    clock = step_clock(device, any_head.tp)
    steps = {
        name: (graphed_step if can_capture(head) else forward_step)(head, batches, clock)
        for name, head in heads.items()
    }
    wall = _time_together(steps, control, effort)
    if oversubscribed:
        alone, splits = _time_alone(heads, batches, recordings, control, effort)
    else:
        alone = {}
        rounds = _split_rounds(next(iter(wall.values())).num_iterations)
        work = together_work(heads, batches)
        parts = time_parts(work, rounds, device, clock)
        splits = split_over_ranks(parts, control, alone=False)
    batch_size = batches[0].shape[0]
    reads = control.gather({n: head.read_bytes_per_step(batch_size) for n, head in heads.items()})
    workspaces = control.gather(
        {n: workspace_bytes(device, partial(h.forward, batches[0])) for n, h in heads.items()}
    )
    cells: dict[str, HeadCell] = {}
    for name, head in heads.items():
        head.tp.reset()
        head.forward(batches[0])
        account = (head.tp.num_collectives, float(head.tp.payload_bytes), head.tp.sent_bytes)
        read_bytes = tuple(rank[name] for rank in reads)
        cells[name] = HeadCell(
            wall=wall[name],
            alone=alone.get(name),
            projected_communication_us=_project(recordings[name][:1], head.tp.tp_size, costs),
            num_collectives=account[0],
            payload_bytes=account[1],
            sent_bytes=account[2],
            counted=_count(head, batches[0], wall[name].median_us, wire),
            split=splits[name],
            read_bytes_by_rank=read_bytes,
            workspace_bytes=max(
                (rank[name] for rank in workspaces if rank[name] is not None), default=None
            ),
            **_device_counts(head, batches[0], wall[name].median_us, account[2], control),
        )
    return cells


def _project(
    recordings: Sequence[Recording], tp_size: int, costs: Mapping[Operation, ExchangeCost]
) -> float | None:
    """Communication of one recorded step; None without a recording or without a cost it needs."""
    for recording in recordings:
        if all(operation in costs for operation, _ in recording.exchanges):
            return projected_communication_us(recording.exchanges, tp_size, costs)
    return None


def _time_together(
    steps: Mapping[str, Step], control: Control, effort: Effort
) -> dict[str, Latency]:
    warm = time_interleaved(steps, max(1, effort.warmup))
    number = _agreed_iterations(warm, control, effort, effort.cell_seconds)
    with annotate(CAPTURE, len(control.ranks)):
        mine = time_interleaved(steps, number)
    return _over_ranks(mine, control)


def _time_alone(
    heads: Mapping[str, Head],
    batches: Sequence[Tensor],
    recordings: Mapping[str, Sequence[Recording]],
    control: Control,
    effort: Effort,
) -> tuple[dict[str, Latency], dict[str, StepSplit]]:
    """Each rank in its turn replays its steps while the others sleep in the store."""
    steps = {
        name: alone_step(head, batches[:_NUM_ALONE_BATCHES], recordings[name])
        for name, head in heads.items()
    }
    work = alone_work(heads, batches, recordings)

    mine: dict[str, RankTimes] = {}
    parts: dict[str, RankParts] = {}
    number = 0
    for turn in control.ranks:
        control.barrier()
        if turn == control.rank:
            warm = time_interleaved(steps, 1)
        if turn == control.ranks[0]:
            # The first rank is alone while it chooses for all: the others wait for its word.
            share_s = effort.cell_seconds / len(control.ranks)
            chosen = _iterations(warm, effort, share_s) if control.is_first else None
            number = int(control.broadcast(chosen))
        if turn == control.rank:
            mine = time_interleaved(steps, number)
            device = next(iter(heads.values())).tp.device
            parts = time_parts(work, _split_rounds(number), device, HostClock())
    control.barrier()
    return _over_ranks(mine, control), split_over_ranks(parts, control, alone=True)


def _split_rounds(num_iterations: int) -> int:
    """Rounds that take a step apart: half as many as time it."""
    return max(MIN_ITERATIONS, num_iterations // 2)


def _agreed_iterations(
    warm: Mapping[str, RankTimes], control: Control, effort: Effort, seconds: float
) -> int:
    return int(max(control.gather(_iterations(warm, effort, seconds))))


def _iterations(warm: Mapping[str, RankTimes], effort: Effort, seconds: float) -> int:
    """Rounds that fit into `seconds`, judged by the last warm-up round."""
    round_us = sum(times.wall_us[-1] for times in warm.values())
    fitting = int(seconds * 1e6 / max(round_us, 1.0))
    return min(effort.iterations, max(MIN_ITERATIONS, fitting))


def _over_ranks(mine: Mapping[str, RankTimes], control: Control) -> dict[str, Latency]:
    ranks = control.gather({name: times.as_json() for name, times in mine.items()})
    return {name: summarise([RankTimes.from_json(rank[name]) for rank in ranks]) for name in mine}


def _count(
    head: Head, batch: Tensor, wall_us: float, wire: WireCounter | None
) -> CountedBytes | None:
    if wire is None:
        return None
    num_steps = min(_MAX_BURST_STEPS, max(2, int(_BURST_S * 1e6 / wall_us)))
    return wire.count(lambda: head.forward(batch), num_steps, _NUM_BURSTS)


def _device_counts(
    head: Head, batch: Tensor, wall_us: float, sent_bytes: float, control: Control
) -> dict[str, Any]:
    """`device_counts` of a cell, or why there are none."""
    device = head.tp.device
    if device.type != "cuda":
        return {"device_counts": (), "device_counts_reason": ON_CPU}
    counts = count_on_devices(
        lambda: head.forward(batch),
        wall_us,
        control,
        device,
        sent_bytes=sent_bytes,
        read_bytes=head.read_bytes_per_step(batch.shape[0]),
    )
    return {"device_counts": tuple(counts), "device_counts_reason": None}
