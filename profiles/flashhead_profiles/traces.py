"""Profiles read into one pandas frame: ranges, and the kernels and communication under them.

`read_profile` reads a folder that launch/profile.sh wrote. The readers of single formats (Chrome
traces here, `nsys`) fill a `Trace`; `timeline` makes the frame:

    range              name of the range, one of `ranges.NAMES`
    label              what follows its colon, else that of the nearest range around it: its head
    rank
    start_us           on the trace's own clock
    duration_us
    kernels_us         time in which a GPU kernel launched in the range ran, communication left out
    communication_us   time in which communication of the range ran
    overlap_us         time in which both ran
    depth              number of our ranges around it
    payload            its number, where the format has it

A figure that the trace does not hold is NaN, and `frame.attrs["missing"]` gives the reason by
column. A kernel belongs to every range of the thread that launched it, at the moment of the launch.
Times are unions: two kernels at once count once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

COLUMNS = (
    "range",
    "label",
    "rank",
    "start_us",
    "duration_us",
    "kernels_us",
    "communication_us",
    "overlap_us",
    "depth",
    "payload",
)
_COMMUNICATION = ("nccl", "gloo:", "exchange_kernel", "mpi:", "ucc:")
_Intervals = npt.NDArray[np.float64]


class TraceError(ValueError):
    """A profile that cannot be read or does not hold what is asked of it; one sentence."""


@dataclass(frozen=True)
class TraceRange:
    """One of our ranges, on the thread that entered it."""

    name: str
    label: str | None
    payload: int | None
    start_us: float
    stop_us: float
    thread: object


@dataclass(frozen=True)
class Work:
    """Something that ran: a kernel with the moment and thread of its launch, or host-side work.

    launch_us, thread: None for work that belongs to whatever range is open while it runs.
    """

    name: str
    start_us: float
    stop_us: float
    launch_us: float | None = None
    thread: object = None

    @property
    def is_communication(self) -> bool:
        """Whether it is a collective's, by its name."""
        name = self.name.lower()
        return any(part in name for part in _COMMUNICATION)


@dataclass(frozen=True)
class Trace:
    """One rank's profile. missing: why a column of the frame cannot be filled, by its name."""

    rank: int
    ranges: Sequence[TraceRange]
    work: Sequence[Work]
    missing: dict[str, str] = field(default_factory=dict)


def timeline(trace: Trace) -> pd.DataFrame:
    """The frame of one rank, in the order in which its ranges began."""
    kernels = _Launched(w for w in trace.work if not w.is_communication)
    communication = _Launched(w for w in trace.work if w.is_communication)
    rows: list[dict[str, Any]] = []
    # The outer one first where two begin at once.
    ranges = sorted(trace.ranges, key=lambda found: (found.start_us, -found.stop_us))
    # By thread, the ends and labels of the ranges that are open.
    open_until: dict[object, list[tuple[float, str | None]]] = {}
    for found in ranges:
        around = open_until.setdefault(found.thread, [])
        while around and around[-1][0] <= found.start_us:
            around.pop()
        label = found.label or (around[-1][1] if around else None)
        compute, exchange = kernels.under(found), communication.under(found)
        rows.append(
            {
                "range": found.name,
                "label": label,
                "rank": trace.rank,
                "start_us": found.start_us,
                "duration_us": found.stop_us - found.start_us,
                "kernels_us": _length(compute),
                "communication_us": _length(exchange),
                "overlap_us": _length(intersection(compute, exchange)),
                "depth": len(around),
                "payload": found.payload,
            }
        )
        around.append((found.stop_us, label))
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    for column in trace.missing:
        frame[column] = np.nan
    frame.attrs["missing"] = dict(trace.missing)
    return frame


def rank_in_name(path: Path) -> int | None:
    """The rank in a file's name, as in `rank0` or `rank_0`."""
    named = re.search(r"rank_?(\d+)", path.name)
    return int(named[1]) if named else None


def medians(frame: pd.DataFrame) -> pd.DataFrame:
    """Number and median microseconds of each range, by label and rank."""
    figures = ["duration_us", "kernels_us", "communication_us", "overlap_us"]
    grouped = frame.groupby(["range", "label", "rank"], dropna=False, sort=False)
    found = grouped[figures].median()
    found.insert(0, "number", grouped.size())
    return found.reset_index()


class _Launched:
    """Work sorted by launch, to be asked what belongs to a range."""

    def __init__(self, work: Iterable[Work]) -> None:
        self._by_thread: dict[object, tuple[npt.NDArray[np.float64], _Intervals]] = {}
        by_thread: dict[object, list[Work]] = {}
        loose: list[Work] = []
        for item in work:
            if item.launch_us is None:
                loose.append(item)
            else:
                by_thread.setdefault(item.thread, []).append(item)
        for thread, items in by_thread.items():
            items.sort(key=lambda item: item.launch_us or 0.0)
            launches = np.array([item.launch_us for item in items], dtype=float)
            self._by_thread[thread] = launches, _intervals(items)
        self._loose = union(_intervals(loose))

    def under(self, found: TraceRange) -> _Intervals:
        """The union of what the range launched, and of loose work while it was open."""
        parts = [intersection(self._loose, np.array([[found.start_us, found.stop_us]]))]
        launched = self._by_thread.get(found.thread)
        if launched is not None:
            launches, intervals = launched
            first, last = np.searchsorted(launches, (found.start_us, found.stop_us))
            parts.append(intervals[first:last])
        return union(np.concatenate(parts))


def _intervals(work: Sequence[Work]) -> _Intervals:
    return np.array([(item.start_us, item.stop_us) for item in work], dtype=float).reshape(-1, 2)


def union(intervals: _Intervals) -> _Intervals:
    """Disjoint ascending intervals `[n, 2]` that cover what `intervals [m, 2]` cover."""
    if len(intervals) == 0:
        return intervals.reshape(0, 2)
    ordered = intervals[intervals[:, 0].argsort(kind="stable")]
    reach = np.maximum.accumulate(ordered[:, 1])
    begins = np.concatenate([[True], ordered[1:, 0] > reach[:-1]])
    ends = np.concatenate([begins[1:], [True]])
    return np.stack([ordered[begins, 0], reach[ends]], axis=1)


def intersection(first: _Intervals, second: _Intervals) -> _Intervals:
    """What two lists of disjoint ascending intervals have in common."""
    found = []
    i = j = 0
    while i < len(first) and j < len(second):
        start, stop = max(first[i, 0], second[j, 0]), min(first[i, 1], second[j, 1])
        if start < stop:
            found.append((start, stop))
        if first[i, 1] < second[j, 1]:
            i += 1
        else:
            j += 1
    return np.array(found, dtype=float).reshape(-1, 2)


def _length(intervals: _Intervals) -> float:
    return float((intervals[:, 1] - intervals[:, 0]).sum())
