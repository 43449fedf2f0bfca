"""Ranges, kernels and communication put together: what belongs to whom, and unions of time."""

from __future__ import annotations

import numpy as np
import pandas as pd

from flashhead_profiles.traces import (
    COLUMNS,
    Trace,
    TraceRange,
    Work,
    intersection,
    medians,
    timeline,
    union,
)


def found(name: str, start_us: float, stop_us: float, thread: object = 1) -> TraceRange:
    return TraceRange(name, None, None, start_us, stop_us, thread)


RANGES = [
    found("step", 0, 100),
    found("head/exchange", 60, 95),
    found("head/centroids", 0, 60),
    found("step", 100, 150),
]


def test_columns_order_and_depth() -> None:
    frame = timeline(Trace(3, RANGES, []))
    assert tuple(frame.columns) == COLUMNS
    assert list(frame["range"]) == ["step", "head/centroids", "head/exchange", "step"]
    assert list(frame["depth"]) == [0, 1, 1, 0]
    assert list(frame["duration_us"]) == [100, 60, 35, 50]
    assert set(frame["rank"]) == {3}


def test_a_kernel_belongs_to_the_range_that_launched_it_though_it_runs_later() -> None:
    """Matching by when it ran would give the first kernel to the second step."""
    work = [
        Work("dots_kernel", 105, 125, 10, 1),
        Work("candidates_kernel", 125, 130, 20, 1),
        Work("other", 0, 100, 30, 2),
    ]
    frame = timeline(Trace(0, RANGES, work))
    assert list(frame["kernels_us"]) == [25, 25, 0, 0]
    assert list(frame["communication_us"]) == [0, 0, 0, 0]


def test_kernels_at_once_count_once_and_overlap_with_communication_is_seen() -> None:
    work = [
        Work("one", 10, 30, 1, 1),
        Work("two", 20, 40, 2, 1),
        Work("ncclDevKernel_AllGather", 35, 80, 3, 1),
        Work("exchange_kernel", 90, 95, 4, 1),
    ]
    frame = timeline(Trace(0, RANGES, work))
    step = frame.iloc[0]
    assert (step["kernels_us"], step["communication_us"], step["overlap_us"]) == (30, 50, 5)


def test_work_without_a_launch_belongs_to_the_range_that_is_open_while_it_runs() -> None:
    frame = timeline(Trace(0, RANGES, [Work("gloo:all_reduce", 90, 120)]))
    assert list(frame["communication_us"]) == [10, 0, 5, 20]


def test_ranges_of_two_threads_are_not_inside_each_other() -> None:
    ranges = [found("step", 0, 100, 1), found("head/check", 10, 20, 2)]
    assert list(timeline(Trace(0, ranges, []))["depth"]) == [0, 0]


def test_a_label_holds_for_the_ranges_inside() -> None:
    labelled = TraceRange("head", "flashhead", None, 0, 50, 1)
    ranges = [found("step", 0, 100), labelled, found("head/check", 5, 10), found("body", 50, 90)]
    frame = timeline(Trace(0, ranges, []))
    assert list(frame["label"].fillna("")) == ["", "flashhead", "flashhead", ""]


def test_what_is_missing_is_nan_with_a_reason() -> None:
    frame = timeline(Trace(0, RANGES, [], {"kernels_us": "no GPU"}))
    assert frame["kernels_us"].isna().all()
    assert frame["communication_us"].notna().all()


def test_medians_by_range_and_rank() -> None:
    frame = pd.concat(timeline(Trace(rank, RANGES, [])) for rank in (0, 1))
    table = medians(frame).set_index(["range", "rank"])
    assert table.loc[("step", 1), "duration_us"] == 75
    assert table.loc[("step", 0), "number"] == 2


def test_unions_and_intersections() -> None:
    def of(*pairs: tuple[float, float]) -> np.ndarray:  # type: ignore[type-arg]
        return np.array(pairs, dtype=float).reshape(-1, 2)

    assert union(of()).shape == (0, 2)
    # A long interval reaches over a short one that ends before it.
    assert union(of((5, 6), (0, 10), (10, 12), (20, 21))).tolist() == [[0, 12], [20, 21]]
    assert intersection(of((0, 10), (20, 30)), of((5, 25))).tolist() == [[5, 10], [20, 25]]
    assert intersection(of((0, 1)), of((1, 2))).tolist() == []
