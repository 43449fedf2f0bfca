"""Bytes that the ranks' GPUs count while they take steps, beside what a step should move."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch

from flashhead_dist.bench.control import Control
from flashhead_profiles.nvml import MEMORY, Counted, DeviceCounters

ON_CPU = "this run computes on the CPU; NVML counts what GPUs move"
_BURST_S = 0.5
_MAX_STEPS = 2_000


@dataclass(frozen=True, kw_only=True)
class DeviceCount:
    """Bytes of one step over all ranks' GPUs; `bytes_per_step` is None for a `reason`.

    analytic_bytes_per_step: for links, what the ranks of a ring send (or receive), whichever link
        carries it; for memory, the weights that a step reads, without what else it touches.
    """

    name: str
    bytes_per_step: float | None
    analytic_bytes_per_step: float
    reason: str | None


def count_on_devices(
    step: Callable[[], object],
    wall_us: float,
    control: Control,
    device: torch.device,
    *,
    sent_bytes: float,
    read_bytes: int,
) -> list[DeviceCount]:
    """Count a burst of `step`, which takes about `wall_us`; every rank of the group calls it.

    sent_bytes, read_bytes: analytic, of one step on this rank.
    """
    counters = DeviceCounters(str(torch.cuda.get_device_properties(device).uuid))
    num_steps = max(1, min(_MAX_STEPS, int(_BURST_S * 1e6 / wall_us)))
    num_steps = int(max(control.gather(num_steps)))
    torch.cuda.synchronize(device)
    control.barrier()
    counters.start()
    start_s = time.perf_counter()
    for _ in range(num_steps):
        step()
    torch.cuda.synchronize(device)
    counted = counters.stop(time.perf_counter() - start_s)
    ranks = control.gather([{n: asdict(c) for n, c in counted.items()}, sent_bytes, read_bytes])
    return sum_over_ranks(
        [{name: Counted(**count) for name, count in rank[0].items()} for rank in ranks],
        num_steps,
        sent_bytes=sum(rank[1] for rank in ranks),
        read_bytes=sum(rank[2] for rank in ranks),
    )


def sum_over_ranks(
    ranks: Sequence[Mapping[str, Counted]], num_steps: int, *, sent_bytes: float, read_bytes: int
) -> list[DeviceCount]:
    """Bytes of one step over all ranks; missing where one rank misses it."""
    counts = []
    for name in ranks[0]:
        reasons = [rank[name].reason for rank in ranks if rank[name].reason is not None]
        total = sum(rank[name].num_bytes or 0.0 for rank in ranks)
        counts.append(
            DeviceCount(
                name=name,
                bytes_per_step=None if reasons else total / num_steps,
                analytic_bytes_per_step=read_bytes if name == MEMORY else sent_bytes,
                reason=reasons[0] if reasons else None,
            )
        )
    return counts
