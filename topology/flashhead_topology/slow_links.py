"""Which host of several has a slow link, from round trips between all pairs of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

SLOW_BY = 2.0
"""A link is slow where its host's quickest round trip is this much longer than the others'."""


@dataclass(frozen=True)
class SlowLink:
    """One host's median round trip with the others, and that of the others among themselves."""

    host: int
    seconds: float
    others_s: float

    @property
    def factor(self) -> float:
        """How much longer its round trips take."""
        return self.seconds / self.others_s


def slow_links(round_trips_s: Mapping[tuple[int, int], float]) -> list[SlowLink]:
    """Hosts with a slow link, ascending; none where fewer than three hosts were compared.

    Every trip of a host with a slow link is long, and of each of the others one is; so a host's
    quickest trip is set against the quickest that it has no part in.

    round_trips_s: by pair of hosts, each pair once, all pairs of the hosts in it.
    """
    hosts = sorted({host for pair in round_trips_s for host in pair})
    found: list[SlowLink] = []
    for host in hosts:
        own = [seconds for pair, seconds in round_trips_s.items() if host in pair]
        others = [seconds for pair, seconds in round_trips_s.items() if host not in pair]
        if others and min(own) > SLOW_BY * min(others):
            found.append(SlowLink(host, median(own), median(others)))
    return found
