"""kernels/bench.py: verdicts, table and page of made-up measurements."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest

import bench
import bench_ways as ways

ENVIRONMENT: dict[str, Any] = {
    "device": "MADE UP H200",
    "driver": "1.2.3",
    "versions": {"torch": "2.13.0", "triton": "3.9.0"},
    "operations": "flashhead_kernels.cuda",
    "commit": "0123456789",
    "time_utc": "2026-01-02T03:04:05+00:00",
    "timing": "CUDA events.",
    "complete": True,
}
# Microseconds by way; 40 MB at 4,000 GB/s are 10 us, so flashhead may take 19.
TIMES = {
    ways.FLASHHEAD: 19.0,
    ways.DENSE_FUSED: 80.0,
    ways.DENSE_TORCH: 95.0,
    ways.PUBLISHED_EAGER: 57.0,
}


def a_frame(device: str = "MADE UP H200", **changes: float) -> pd.DataFrame:
    times = {**TIMES, **changes}
    rows = [
        {
            "device": device,
            "model": "gemma-3-270m",
            "tp_size": tp_size,
            "batch_size": batch_size,
            "way": way,
            "median_us": us / tp_size,
            "p10_us": us / tp_size - 1,
            "p90_us": us / tp_size + 2,
            "read_bytes": 40e6 / tp_size,
            "copy_gb_per_s": 4000.0,
            "share_of_copy": 0.53,
            "times_flashhead": us / times[ways.FLASHHEAD],
        }
        for tp_size in (1, 2)
        for batch_size in (1, 8)
        for way, us in times.items()
    ]
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("changes", "met"),
    [
        ({}, [True, True, True]),
        (
            {ways.FLASHHEAD: 19.1, ways.DENSE_TORCH: 200.0, ways.PUBLISHED_EAGER: 100.0},
            [False, True, True],
        ),
        ({ways.DENSE_TORCH: 94.9}, [True, False, True]),
        ({ways.PUBLISHED_EAGER: 56.9}, [True, True, False]),
    ],
)
def test_verdicts_change_at_their_limits(changes: dict[str, float], met: list[bool]) -> None:
    assert [verdict["met"] for verdict in bench.judge(a_frame(**changes))] == met


def test_another_device_and_other_sizes_are_not_judged() -> None:
    assert {verdict["met"] for verdict in bench.judge(a_frame("Some CPU"))} == {None}
    frame = a_frame()
    assert bench.judge(frame[frame["tp_size"] == 2]) == []


def test_the_table_has_a_row_a_cell_and_a_blank_where_a_way_is_missing() -> None:
    frame = a_frame(**{ways.PUBLISHED_GRAPH: 38.0})
    there = (frame["way"] != ways.PUBLISHED_GRAPH) | (frame["batch_size"] == 1)
    table = bench.summary(frame[there])
    assert table[["tp_size", "batch_size"]].to_numpy().tolist() == [[1, 1], [1, 8], [2, 1], [2, 8]]
    first = table.iloc[0]
    assert (first["median_us"], first["p10_us"], first["read_MB"]) == (19.0, 18.0, 40.0)
    assert (first[ways.DENSE_FUSED], first[ways.PUBLISHED_GRAPH]) == (4.21, 2.0)
    assert table[ways.PUBLISHED_GRAPH].isna().tolist() == [False, True, False, True]


@pytest.mark.parametrize("complete", [True, False])
def test_the_page_names_its_origin_and_is_a_whole_table(complete: bool) -> None:
    page = bench.markdown(a_frame(), {**ENVIRONMENT, "complete": complete}, ["a note"])
    for part in (
        "MADE UP H200",
        "1.2.3",
        "2.13.0",
        "3.9.0",
        "0123456789",
        "2026-01-02",
        "- a note",
    ):
        assert part in page
    assert ("INCOMPLETE" in page) != complete
    lines = [line for line in page.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 4
    assert len({line.count("|") for line in lines}) == 1
