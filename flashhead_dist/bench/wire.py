"""Bytes of one step of a head, counted by network interfaces and by GPUs.

A burst of equal steps is read against a quiet window of the same length with the same handshakes
(see `flashhead_profiles.counters`), several times. The first rank of each network namespace reads
its own counters; the sum over namespaces is what all ranks sent. NVML counts what GPUs move.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch

from flashhead_dist.bench.control import Control
from flashhead_profiles.counters import (
    MEMORY,
    Burst,
    Counted,
    CountedBytes,
    DeviceCounters,
    interfaces_to_count,
    least_disturbed,
    network_namespace,
    read_sent_bytes,
)


class WireCounter:
    """Counts for one set of ranks; every rank of the set makes the same calls.

    host: a name that two ranks share only where they share a kernel, as a boot id does.
    """

    def __init__(self, control: Control, host: str) -> None:
        self._control = control
        places = [tuple(place) for place in control.gather([host, network_namespace()])]
        mine = places[control.ranks.index(control.rank)]
        self._reads = control.ranks[places.index(mine)] == control.rank
        self.interfaces = interfaces_to_count(len(set(places)))

    def count(self, step: Callable[[], object], num_steps: int, num_bursts: int) -> CountedBytes:
        """Count `step`, which every rank runs `num_steps` times in each of `num_bursts` bursts.

        Returns:
            Bytes that all ranks together sent in one step, protocol included; on every rank.
        """
        bursts: list[Burst] = []
        for _ in range(num_bursts):
            sent, seconds, reason = self._window(lambda: _repeat(step, num_steps))
            length_s = self._control.broadcast(seconds)
            first = self._control.is_first
            quiet, quiet_s, quiet_reason = self._window(
                lambda: time.sleep(length_s) if first else None  # noqa: B023
            )
            if sent is None or quiet is None:
                return CountedBytes(None, reason=reason or quiet_reason)
            bursts.append(Burst(num_steps, sent, seconds, quiet, quiet_s))
        counted = least_disturbed(bursts)
        return CountedBytes(**self._control.broadcast(asdict(counted)))

    def _window(self, work: Callable[[], object]) -> tuple[int | None, float, str | None]:
        """Bytes sent by all namespaces while every rank does `work`, its seconds, and why not."""
        self._control.barrier()
        before = read_sent_bytes(self.interfaces)
        start_s = time.perf_counter()
        self._control.barrier()
        work()
        self._control.barrier()
        seconds = time.perf_counter() - start_s
        after = read_sent_bytes(self.interfaces)
        if after.sent_bytes is None or before.sent_bytes is None:
            mine: list[object] = [None, after.reason or before.reason]
        else:
            mine = [after.sent_bytes - before.sent_bytes if self._reads else 0, None]
        readings = self._control.gather(mine)
        reasons = [reason for sent, reason in readings if sent is None]
        if reasons:
            return None, seconds, str(reasons[0])
        return sum(int(sent) for sent, _ in readings), seconds, None


def _repeat(step: Callable[[], object], times: int) -> None:
    for _ in range(times):
        step()


ON_CPU = "this run computes on the CPU; NVML counts what GPUs move"
_DEVICE_BURST_S = 0.5
_MAX_DEVICE_STEPS = 2_000


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
    num_steps = max(1, min(_MAX_DEVICE_STEPS, int(_DEVICE_BURST_S * 1e6 / wall_us)))
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
