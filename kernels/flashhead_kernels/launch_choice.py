"""One launch of the head or two: a table of what was measured on this device.

Which is faster depends on the device, the shape of the shard and the batch. The first time that a
case is met both ways are timed, and the faster one serves it from then on; a store keeps the times
for other processes. A case that is first met while a graph is captured, or under the interpreter,
is served by the rule that was there before the table, one launch, and is measured when it is met
again.

The choice is a rank's own: with integer centroids both ways give the same bits (see
`triton_head.integer_dots`). With 16-bit centroids they add in an order of their own, so that
a probe whose score ties within rounding may differ between ranks that chose differently.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

import torch

from flashhead_kernels.timing import Clock, Run, StreamClock, kernels_hash, time_steps
from flashhead_kernels.triton_shapes import CentroidShape, HeadShape

_WARM_UPS = 3
_ROUNDS = 15

MEASURED_NOW = "measured now"
CAPTURED = "one launch by rule: first met while a graph was captured"
NO_GPU = "one launch by rule: nothing to time without a GPU"


@dataclass(frozen=True)
class LaunchCase:
    """What the times depend on; `device` and dtypes by name, `groups` of this rank.

    batch: rows, rounded up to a power of two.
    """

    device: str
    groups: int
    batch: int
    rows: str
    hidden: str
    logsumexp: bool
    head: HeadShape
    centroids: CentroidShape | None

    def as_json(self) -> dict[str, Any]:
        """The form that a store finds it by, with the software that the times are of."""
        return asdict(self) | _software()


@dataclass(frozen=True)
class LaunchChoice:
    """launches: 1 or 2. one_us, two_us: medians, None where nothing was timed."""

    launches: int
    origin: str
    one_us: float | None = None
    two_us: float | None = None


class LaunchStore(Protocol):
    """Where measured times outlive the process; both mappings hold JSON values."""

    def find(self, case: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """What was kept of `case`, or None."""

    def keep(self, case: Mapping[str, Any], found: Mapping[str, Any]) -> object:
        """Keep `found` for `case`."""


class LaunchTable:
    """The choices of this process, and the store behind them, where one was given."""

    def __init__(self) -> None:
        self.store: LaunchStore | None = None
        self._choices: dict[LaunchCase, LaunchChoice] = {}

    def choose(self, case: LaunchCase, one: Run, two: Run, device: torch.device) -> int:
        """1 or 2, whichever serves `case` sooner; `one` and `two` do it each way on `device`."""
        choice = self._choices.get(case)
        if choice is None or choice.one_us is None:
            choice = self._learn(case, one, two, device)
            self._choices[case] = choice
        return choice.launches

    def choices(self) -> list[dict[str, Any]]:
        """All choices so far, as JSON values."""
        return [case.as_json() | asdict(choice) for case, choice in self._choices.items()]

    def _learn(self, case: LaunchCase, one: Run, two: Run, device: torch.device) -> LaunchChoice:
        if _capturing(device):
            return LaunchChoice(1, CAPTURED)
        kept = self.store.find(case.as_json()) if self.store is not None else None
        if kept is not None:
            origin = f"cached {kept['time_utc']}"
            return _faster(float(kept["one_us"]), float(kept["two_us"]), origin)
        clock = launch_clock(device)
        if clock is None:
            return LaunchChoice(1, NO_GPU)
        one_us, two_us = _medians_us(one, two, clock)
        if self.store is not None:
            now = datetime.now(UTC).isoformat(timespec="seconds")
            found = {"one_us": one_us, "two_us": two_us, "time_utc": now}
            self.store.keep(case.as_json(), found)
        return _faster(one_us, two_us, MEASURED_NOW)


table = LaunchTable()
"""Of this process."""


def launch_clock(device: torch.device) -> Clock | None:
    """What times launches on `device`; None where there is no GPU."""
    return StreamClock(device) if device.type == "cuda" else None


@functools.cache
def device_name(device: torch.device) -> str:
    """Name of a GPU; the type of any other device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _medians_us(one: Run, two: Run, clock: Clock) -> tuple[float, float]:
    """`triton.testing.do_bench` would time one way after the other, so that a clock that changes
    between them falls on one of them."""
    ways = {"one": lambda number: clock.time_us(one), "two": lambda number: clock.time_us(two)}
    time_steps(ways, _WARM_UPS)
    times = time_steps(ways, _ROUNDS)
    return statistics.median(times["one"]), statistics.median(times["two"])


def _faster(one_us: float, two_us: float, origin: str) -> LaunchChoice:
    return LaunchChoice(2 if two_us < one_us else 1, origin, one_us, two_us)


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@functools.cache
def _software() -> dict[str, str]:
    import triton

    return {"kernels": kernels_hash(), "triton": triton.__version__, "torch": torch.__version__}
