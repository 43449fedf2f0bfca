"""Bytes that the kernel counted on a network interface, and how many of them a step sent.

What is counted is every byte *sent* on the interface inside this network namespace: payload,
protocol of the collective library, TCP and IP headers, acknowledgements. On the loopback of a host
that includes everybody else's traffic. So a figure comes from several bursts of equal steps, each
paired with a quiet window of the same length and the same handshakes: the least disturbed burst
less the least disturbed quiet window. Other traffic can only add, and it must fall on every burst
or on every quiet window to show.

An unknown count is None with a reason, never 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

PROC_NET_DEV = Path("/proc/self/net/dev")
"""The counters of the namespace that this process is in."""

_SENT_BYTES_FIELD = 8


@dataclass(frozen=True)
class Reading:
    """Bytes sent so far on some interfaces, or the reason why that is not known."""

    sent_bytes: int | None
    reason: str | None = None


@dataclass(frozen=True)
class Burst:
    """One burst of equal steps and its quiet twin; seconds are the lengths of the two windows."""

    num_steps: int
    sent_bytes: int
    seconds: float
    quiet_sent_bytes: int
    quiet_seconds: float

    @property
    def bytes_per_step(self) -> float:
        """Bytes a step sent in this burst, less its own quiet window's at the same rate."""
        background = self.quiet_sent_bytes * self.seconds / self.quiet_seconds
        return (self.sent_bytes - background) / self.num_steps


@dataclass(frozen=True)
class CountedBytes:
    """Bytes sent in one step; `least` and `greatest` are those of single bursts."""

    per_step: float | None
    least: float | None = None
    greatest: float | None = None
    num_bursts: int = 0
    reason: str | None = None


def parse_proc_net_dev(text: str) -> dict[str, int]:
    """Return bytes sent by interface name from the text of /proc/net/dev.

    Raises:
        ValueError: the text is not in the kernel's format.
    """
    sent: dict[str, int] = {}
    for line in text.splitlines()[2:]:
        name, separator, rest = line.partition(":")
        fields = rest.split()
        if not separator or len(fields) <= _SENT_BYTES_FIELD:
            raise ValueError(f"not a line of /proc/net/dev: {line!r}")
        sent[name.strip()] = int(fields[_SENT_BYTES_FIELD])
    return sent


def read_sent_bytes(interfaces: Iterable[str], path: Path = PROC_NET_DEV) -> Reading:
    """Return the sum of bytes sent on `interfaces`; None with a reason where one is missing."""
    try:
        counters = parse_proc_net_dev(path.read_text())
    except (OSError, ValueError) as error:
        return Reading(None, f"{path} is not readable: {error}")
    names = list(interfaces)
    missing = [name for name in names if name not in counters]
    if missing:
        return Reading(None, f"no interface {', '.join(missing)} in {path}")
    return Reading(sum(counters[name] for name in names))


def network_namespace() -> str | None:
    """Return an identifier of this process's network namespace, or None where there is none."""
    link = Path("/proc/self/ns/net")
    return str(link.readlink()) if link.exists() else None


def interfaces_to_count(num_namespaces: int, path: Path = PROC_NET_DEV) -> tuple[str, ...]:
    """Choose the interfaces that carry the ranks' traffic in this namespace.

    Ranks in one namespace talk over `lo`, whatever address they use: the kernel routes a packet for
    its own address there. With several namespaces (or hosts) the traffic also leaves by the others;
    bridges and their member interfaces would count it twice, which a private namespace does not
    have.
    """
    if num_namespaces == 1:
        return ("lo",)
    try:
        return tuple(sorted(parse_proc_net_dev(path.read_text())))
    except (OSError, ValueError):
        return ("lo",)


def least_disturbed(bursts: Sequence[Burst]) -> CountedBytes:
    """Return the bytes of a step from `bursts` of equal numbers of steps.

    The burst with the fewest bytes, less those of the quiet window with the lowest rate over that
    burst's length. A difference below zero within the bursts' own scatter is no traffic at all.
    """
    if not bursts:
        return CountedBytes(None, reason="no burst was counted")
    calm = min(bursts, key=lambda burst: burst.sent_bytes)
    quiet_rate = min(burst.quiet_sent_bytes / burst.quiet_seconds for burst in bursts)
    per_step = (calm.sent_bytes - quiet_rate * calm.seconds) / calm.num_steps
    single = [burst.bytes_per_step for burst in bursts]
    if per_step < 0 and max(single) < 0:
        return CountedBytes(
            None,
            num_bursts=len(bursts),
            reason="other traffic on the interface exceeded this run's own",
        )
    return CountedBytes(max(0.0, per_step), min(single), max(single), len(bursts))
