"""Bytes that one step of a head puts on the wire, counted by the network interface.

A burst of equal steps is read against a quiet window of the same length with the same handshakes
(see `flashhead_profiles.counters`), several times. The first rank of each network namespace reads
its own counters; the sum over namespaces is what all ranks sent.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict

from flashhead_dist.bench.control import Control
from flashhead_profiles.counters import (
    Burst,
    CountedBytes,
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
