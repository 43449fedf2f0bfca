"""One cell of the sweep: every head at one `tp_size` and batch size, on the ranks of one group.

Where the ranks fit the machine, a latency is what the clock saw. Where they are oversubscribed, the
clock sees ranks taking turns; then each rank's compute is measured again in isolation, one rank
after the other, and the communication is taken from the cost model of `links`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from flashhead_dist.bench.control import Control
from flashhead_dist.bench.links import ExchangeCost, projected_communication_us
from flashhead_dist.bench.memory import workspace_bytes
from flashhead_dist.bench.split import (
    RankParts,
    StepSplit,
    split_over_ranks,
    time_parts,
)
from flashhead_dist.bench.timer import (
    Latency,
    Recording,
    Step,
    Times,
    can_capture,
    forward_step,
    graphed_step,
    record_step,
    replay_step,
    step_clock,
    summarise,
)
from flashhead_dist.bench.wire import ON_CPU, DeviceCount, WireCounter, count_on_devices
from flashhead_dist.heads.base import Head
from flashhead_dist.parallel import Operation
from flashhead_kernels.timing import HostClock, time_steps
from flashhead_profiles.counters import CountedBytes
from flashhead_profiles.ranges import CAPTURE, annotate

MIN_ITERATIONS = 3
_ROUNDS_AT_A_TIME = 8
_MEDIAN_WITHIN = 0.02
_NUM_ISOLATED_BATCHES = 4
_BURST_S = 0.06
_MAX_BURST_STEPS = 40
_NUM_BURSTS = 5


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How long to measure a cell: at most `iterations` rounds, and about `cell_seconds`.

    It ends sooner once `median_is_known` of every head.
    """

    iterations: int = 40
    warmup: int = 3
    cell_seconds: float = 15.0


def median_is_known(times_us: Sequence[float]) -> bool:
    """Whether the median is known to 2 %: the bounds of its 95 % confidence interval lie within.

    The bounds are order statistics (binomial, by its normal approximation), whatever the
    distribution; under eight times they are never known.
    """
    number = len(times_us)
    below = int(np.floor(number / 2 - 0.98 * np.sqrt(number)))
    if number < _ROUNDS_AT_A_TIME or below < 1:
        return False
    ordered = np.sort(times_us)
    low, median, high = ordered[below - 1], np.median(ordered), ordered[number - below]
    return bool(low >= (1 - _MEDIAN_WITHIN) * median and high <= (1 + _MEDIAN_WITHIN) * median)


@dataclass(frozen=True, kw_only=True)
class HeadCell:
    """What one cell says of one head. Bytes are of one step, over the batch's rows.

    wall: what the clock saw with all ranks at work.
    isolated: where oversubscribed, compute of ranks that ran by themselves, without communication.
    projected_communication_us: where oversubscribed and the model is known.
    payload_bytes, sent_bytes: analytic, of one rank, as `parallel` defines them.
    counted: by the interface, all ranks together; None at `tp_size` 1.
    split: where the time goes, from rounds of their own, isolated where `isolated` is.
    read_bytes_by_rank: weights that each rank reads in a step, analytic.
    workspace_bytes: of the rank that needs most, see `memory.workspace_bytes`; None on a CPU.
    device_counts: what the ranks' GPUs counted; empty for a `device_counts_reason`.
    """

    wall: Latency
    isolated: Latency | None
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
    tp = next(iter(heads.values())).tp
    num_recordings = _NUM_ISOLATED_BATCHES if oversubscribed else 0
    recordings = {
        name: [record_step(head, batch) for batch in batches[:num_recordings]]
        for name, head in heads.items()
    }
    clock = step_clock(tp.device, tp)
    steps = {
        name: (graphed_step if can_capture(head) else forward_step)(head, batches, clock)
        for name, head in heads.items()
    }
    wall = _time_together(steps, control, effort, oversubscribed)
    isolated: dict[str, Latency] = {}
    if oversubscribed:
        isolated, splits = _time_isolated(heads, batches, recordings, control, effort)
    else:
        work = {name: partial(_forward, head, batches) for name, head in heads.items()}
        rounds = _split_rounds(next(iter(wall.values())).num_iterations)
        parts = time_parts(work, rounds, tp.device, clock)
        splits = split_over_ranks(parts, control, isolated=False)
    batch_size = batches[0].shape[0]
    ranks = control.gather(
        {
            name: [
                head.read_bytes_per_step(batch_size),
                workspace_bytes(tp.device, partial(head.forward, batches[0])),
            ]
            for name, head in heads.items()
        }
    )
    cells: dict[str, HeadCell] = {}
    for name, head in heads.items():
        head.tp.reset()
        head.forward(batches[0])
        sent_bytes, median_us = head.tp.sent_bytes, wall[name].median_us
        workspaces = [rank[name][1] for rank in ranks if rank[name][1] is not None]
        cells[name] = HeadCell(
            wall=wall[name],
            isolated=isolated.get(name),
            projected_communication_us=_project(recordings[name][:1], head.tp.tp_size, costs),
            num_collectives=head.tp.num_collectives,
            payload_bytes=float(head.tp.payload_bytes),
            sent_bytes=sent_bytes,
            counted=_count(head, batches[0], median_us, wire),
            split=splits[name],
            read_bytes_by_rank=tuple(rank[name][0] for rank in ranks),
            workspace_bytes=max(workspaces, default=None),
            **_device_counts(head, batches[0], median_us, sent_bytes, control),
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
    steps: Mapping[str, Step], control: Control, effort: Effort, oversubscribed: bool
) -> dict[str, Latency]:
    """All ranks at once; the same rounds of all heads, and the same on every rank.

    Where ranks are oversubscribed the times are shown beside the latency that the isolated rounds
    give, so that few are enough.
    """
    warm = time_steps(steps, max(1, effort.warmup))
    limit = int(max(control.gather(_most_rounds(warm, effort, effort.cell_seconds))))
    if oversubscribed:
        limit = min(limit, _ROUNDS_AT_A_TIME)
    ranks: list[dict[str, list[tuple[float, float]]]] = [{} for _ in control.ranks]
    done = 0
    with annotate(CAPTURE, len(control.ranks)):
        while done < limit:
            number = min(_ROUNDS_AT_A_TIME, limit - done)
            measured = control.gather(time_steps(steps, number, first=done))
            done += number
            for times, more in zip(ranks, measured, strict=True):
                for name in steps:
                    times.setdefault(name, []).extend(more[name])
            slowest = {n: np.max([[us for us, _ in r[n]] for r in ranks], axis=0) for n in steps}
            if all(median_is_known(times) for times in slowest.values()):
                break
    return {name: summarise([rank[name] for rank in ranks]) for name in steps}


def _time_isolated(
    heads: Mapping[str, Head],
    batches: Sequence[Tensor],
    recordings: Mapping[str, Sequence[Recording]],
    control: Control,
    effort: Effort,
) -> tuple[dict[str, Latency], dict[str, StepSplit]]:
    """Each rank in its turn replays its steps while the others sleep in the store.

    The first rank decides for all how many rounds there are.
    """
    work = {name: partial(_replay, head, batches, recordings[name]) for name, head in heads.items()}
    clock = HostClock()

    def timed(name: str, iteration: int) -> tuple[float, float]:
        return clock.time_us(partial(work[name], iteration)), 0.0

    steps = {name: partial(timed, name) for name in heads}
    mine: dict[str, list[tuple[float, float]]] = {}
    parts: dict[str, RankParts] = {}
    number = 0
    for turn in control.ranks:
        control.barrier()
        if turn == control.rank:
            warm = time_steps(steps, 1)
            limit = _most_rounds(warm, effort, effort.cell_seconds / len(control.ranks))
            mine = _until_known(steps, number or limit, stop=control.is_first)
        if turn == control.ranks[0]:
            chosen = len(next(iter(mine.values()))) if control.is_first else None
            number = int(control.broadcast(chosen))
        if turn == control.rank:
            device = next(iter(heads.values())).tp.device
            parts = time_parts(work, _split_rounds(number), device, clock)
    control.barrier()
    ranks = control.gather(mine)
    latencies = {name: summarise([rank[name] for rank in ranks]) for name in heads}
    return latencies, split_over_ranks(parts, control, isolated=True)


def _until_known(
    steps: Mapping[str, Step], limit: int, *, stop: bool
) -> dict[str, list[tuple[float, float]]]:
    """`limit` rounds on this rank, or fewer where it may `stop` and the medians are known."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    done = 0
    while done < limit:
        number = min(_ROUNDS_AT_A_TIME, limit - done)
        for name, more in time_steps(steps, number, first=done).items():
            times[name] += more
        done += number
        if stop and all(median_is_known([us for us, _ in found]) for found in times.values()):
            break
    return times


def _forward(head: Head, batches: Sequence[Tensor], iteration: int) -> object:
    return head.forward(batches[iteration % len(batches)])


def _replay(
    head: Head, batches: Sequence[Tensor], recordings: Sequence[Recording], iteration: int
) -> None:
    index = iteration % len(recordings)
    replay_step(head, batches[index], recordings[index])


def _split_rounds(num_iterations: int) -> int:
    """Rounds that take a step apart: half as many as time it."""
    return max(MIN_ITERATIONS, num_iterations // 2)


def _most_rounds(warm: Mapping[str, Times], effort: Effort, seconds: float) -> int:
    """Rounds that fit into `seconds`, judged by the last warm-up round."""
    round_us = sum(times[-1][0] for times in warm.values())
    fitting = int(seconds * 1e6 / max(round_us, 1.0))
    return min(effort.iterations, max(MIN_ITERATIONS, fitting))


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
