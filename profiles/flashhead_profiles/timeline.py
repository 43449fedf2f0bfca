"""Ranges of a profile with the kernels and the communication under them, as one pandas frame.

The readers of single formats (`nsys`, `chrome_trace`) fill a `Trace`; `timeline` makes the frame:

    range              name of the range, one of `ranges.NAMES`
    label              what follows its colon, else that of the nearest range around it: its head
    rank
    start_us           on the trace's own clock
    duration_us
    kernels_us         time in which a GPU kernel launched in the range ran, communication left out
    communication_us   time in which communication of the range ran
    overlap_us         time in which both ran
    depth              number of our ranges around it
    payload            its number, where the format keeps it

A figure that the trace does not hold is NaN, and `frame.attrs["missing"]` says why by column. A
kernel belongs to every range of the thread that launched it, at the moment of the launch; it may
run, and count, when the range has long ended. Times are unions: two kernels at once count once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
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


def over_ranks(frames: Iterable[pd.DataFrame]) -> pd.DataFrame:
    """Frames of several ranks in one; what one of them misses is missing there alone.

    Raises:
        TraceError: no frame, or two of one rank.
    """
    frames = list(frames)
    ranks = [int(rank) for frame in frames for rank in frame["rank"].unique()]
    if not frames:
        raise TraceError("no trace was given: name the files that launch/profile.sh wrote")
    if len(set(ranks)) != len(ranks):
        raise TraceError(
            f"two traces are of rank {max(ranks, key=ranks.count)}: give one capture at a time"
        )
    whole = pd.concat(frames, ignore_index=True)
    whole.attrs["missing"] = {k: v for f in frames for k, v in f.attrs["missing"].items()}
    return whole


def shares_of(frame: pd.DataFrame, parent: str) -> pd.DataFrame:
    """How much of each `parent` range its direct children cover.

    Returns:
        One row a `parent`: rank, start_us, duration_us, children_us, share.

    Raises:
        TraceError: no such range.
    """
    rows = []
    for _, ranges in frame.groupby("rank", sort=True):
        ordered: Any = ranges.sort_values(["start_us", "depth"])
        for outer in ordered[ordered["range"] == parent].itertuples():
            stop_us = outer.start_us + outer.duration_us
            inside = ordered[
                (ordered["depth"] == outer.depth + 1)
                & (ordered["start_us"] >= outer.start_us)
                & (ordered["start_us"] < stop_us)
            ]
            children_us = float(inside["duration_us"].sum())
            share = children_us / outer.duration_us if outer.duration_us else np.nan
            rows.append((outer.rank, outer.start_us, outer.duration_us, children_us, share))
    if not rows:
        raise TraceError(f"the trace holds no range {parent!r}")
    return pd.DataFrame(rows, columns=["rank", "start_us", "duration_us", "children_us", "share"])


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
