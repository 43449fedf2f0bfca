"""The parts of the page from golden records: frames, marks of charts, and what is missing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from flashhead_dist.bench.records import Record
from flashhead_dist.bench.split import Quantiles, SlowRank
from flashhead_dist.bench.wire import DeviceCount
from flashhead_dist.errors import UserError
from flashhead_dist.report.figures import Section
from flashhead_dist.report.resource_sections import (
    device_counts_section,
    fidelity_section,
    kernels_section,
    memory_section,
    ranges_section,
    roofline_section,
    wire_section,
)
from flashhead_dist.report.runs import RunFolder
from flashhead_dist.report.step_sections import (
    crossover_section,
    latency_section,
    pipeline_section,
    ranks_section,
    scaling_section,
    slow_ranks,
    split_section,
)
from tests.report.run_folders import changed, environment_of, golden, pipeline_document, run_of

pytest.importorskip("matplotlib")
WITH_CHARTS: list[Callable[[RunFolder], Section]] = [
    latency_section, split_section, scaling_section, ranks_section, wire_section,
    roofline_section, fidelity_section, crossover_section, memory_section, pipeline_section
]  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return run_of(tmp_path / "run", pipeline=pipeline_document())


def marks(charts: tuple[str, ...]) -> list[str]:
    """Titles of the data marks of charts."""
    return re.findall(r'class="mark">\s*<title>([^<]*)</title>', "".join(charts))


@pytest.mark.parametrize("make", WITH_CHARTS)
def test_every_chart_has_the_marks_it_says(
    make: Callable[[RunFolder], Section], run: RunFolder
) -> None:
    section = make(run)
    assert not section.missing
    assert section.charts
    for chart in section.charts:
        (wanted,) = re.findall(r'data-marks="(\d+)"', chart)
        assert len(marks((chart,))) == int(wanted) > 0


@pytest.mark.parametrize("make", [split_section, ranks_section])
def test_charts_of_one_tp_size_share_a_column(
    make: Callable[[RunFolder], Section], run: RunFolder
) -> None:
    section = make(run)
    places = [
        int(place) for chart in section.charts for place in re.findall(r"--place: (\d)", chart)
    ]
    assert places == [*range(1, section.columns + 1)] * len(run.batch_sizes)


def test_measured_and_projected_latencies_share_no_column(run: RunFolder) -> None:
    section = latency_section(run)
    projected = section.frame[section.frame.tp_size == 8]
    assert projected.filter(like="measured_").isna().all(axis=None)
    measured = section.frame[section.frame.tp_size < 8]
    assert measured.filter(like="projected_").isna().all(axis=None)
    assert list(projected.projected_median_us) == [r.median_us for r in golden() if r.tp_size == 8]
    titles = marks(section.charts)
    assert {"PROJECTED" in title for title in titles if ", tp 8:" in title} == {True}
    assert {"PROJECTED" in title for title in titles if ", tp 2:" in title} == {False}
    assert "flashhead, tp 2: 2,150 µs" in titles


def test_scaling_is_against_the_same_head_on_one_rank(run: RunFolder) -> None:
    frame = scaling_section(run).frame
    row = frame[(frame["head"] == "flashhead") & (frame.tp_size == 2) & (frame.batch_size == 1)]
    (found,) = row.to_dict("records")
    assert found["measured_speedup"] == pytest.approx(4000 / 2150)
    assert found["measured_scaling_efficiency"] == pytest.approx(4000 / 2150 / 2)
    assert found["measured_speedup_p10"] == pytest.approx(4000 / 2580)
    assert pd.isna(found["projected_speedup"])


@pytest.mark.parametrize("sizes", [{1}, {2, 8}])
def test_scaling_needs_one_rank_and_more(tmp_path: Path, sizes: set[int]) -> None:
    run = run_of(tmp_path / "run", [r for r in golden() if r.tp_size in sizes])
    assert scaling_section(run).missing


SLOW_BY_US = 3000.0


def same(us: float) -> Quantiles:
    return Quantiles(us * 0.9, us, us * 1.1)


def with_slow_rank(record: Record, heads: tuple[str, ...]) -> Record:
    """Three ranks, the second of which computes 3 ms longer for some heads; the others wait."""
    slow = record.head in heads
    extra = [0.0, SLOW_BY_US if slow else 0.0, 0.0]
    longest = max(extra)
    us = {"centroids": 600.0, "candidates": 300.0, "exchange": 400.0}
    by_rank: dict[str, Any] = {part: [same(value)] * 3 for part, value in us.items()}
    by_rank["other"] = [same(100.0 + value) for value in extra]
    by_rank["waiting"] = [same(longest - value) for value in extra]
    by_rank["step"] = [same(1400.0 + longest)] * 3
    path: dict[str, Any] = {part: same(value) for part, value in us.items()}
    path |= {"other": same(100.0 + longest), "waiting": same(longest)}
    path |= {"step": same(1400.0 + longest)}
    slow_rank = SlowRank(1, SLOW_BY_US) if slow else None
    return replace(
        record,
        tp_size=3,
        split=replace(record.split, step_us=path, by_rank_us=by_rank, slow_rank=slow_rank),
        compute_us_by_rank=[1000.0 + value for value in extra],
        weight_bytes_by_rank=record.weight_bytes_by_rank[:1] * 3,
        peak_bytes_by_rank=record.peak_bytes_by_rank[:1] * 3,
        read_bytes_by_rank=[1_000_000] * 3,
        memory_bandwidth_bytes_per_s_by_rank=[1e9] * 3,
    )


def three_ranks(folder: Path, *heads: str) -> RunFolder:
    return run_of(folder, [with_slow_rank(r, heads) for r in golden() if r.tp_size == 2])


def test_a_slow_rank_is_named_and_the_others_wait(tmp_path: Path) -> None:
    run = three_ranks(tmp_path / "run", "dense_local_max", "flashhead")
    slow = slow_ranks(list(run.records)).iloc[0]
    assert (slow["rank"], slow.num_heads, slow.of_heads) == (1, 2, 3)
    assert (slow.excess_us, slow.waiting_us) == (3000.0, 3000.0)
    section = ranks_section(run)
    assert section.notes[0].startswith("Rank 1 is SLOW at tp 3, batch 1")
    titles = marks(section.charts[:1])
    assert {"rank 0: waiting 3,000 µs", "rank 2: waiting 3,000 µs"} <= set(titles)
    assert not any(title.startswith("rank 1: waiting") for title in titles)
    assert ">slow<" in section.charts[0]
    frame = section.frame
    own = frame[(frame["head"] == "flashhead") & (frame.batch_size == 1)]
    assert list(own.measured_waiting_us) == [3000.0, 0.0, 3000.0]
    assert list(own.over_median_rank) == [1.0, 4.0, 1.0]


def test_a_rank_that_is_slow_for_few_heads_is_not_named(tmp_path: Path) -> None:
    run = three_ranks(tmp_path / "run", "dense_gather")
    assert slow_ranks(list(run.records)).empty
    assert ">slow<" not in ranks_section(run).charts[0]


def test_waiting_of_ranks_that_took_turns_is_projected(run: RunFolder) -> None:
    frame = ranks_section(run).frame
    assert frame[frame.tp_size == 8].measured_waiting_us.isna().all()
    assert frame[frame.tp_size == 2].projected_waiting_us.isna().all()


def test_the_parts_of_a_step_sum_to_its_bar(tmp_path: Path) -> None:
    section = split_section(three_ranks(tmp_path / "run", "flashhead"))
    row = section.frame[section.frame["head"] == "flashhead"].iloc[0]
    parts = row.centroids_us + row.candidates_us + row.other_us + row.exchange_us
    assert parts == row.step_us == 4400.0
    assert row.measured_waiting_us == 3000.0
    titles = marks(section.charts[:1])
    assert "flashhead: other 3,100 µs, 70 %" in titles
    assert "flashhead: another rank waits 3,000 µs" in titles


def test_an_exchange_that_was_not_measured_is_no_zero(run: RunFolder) -> None:
    section = split_section(run)
    assert section.frame[section.frame.tp_size == 8].exchange_us.isna().all()
    assert section.frame[section.frame.tp_size == 2].exchange_us.notna().all()
    titles = marks(tuple(chart for chart in section.charts if "-tp8" in chart))
    assert titles
    assert not any("exchange" in title for title in titles)


def test_large_messages_are_compared_with_the_analytic_bytes(tmp_path: Path) -> None:
    large = {"sent_bytes_per_row": 1e6, "counted_bytes_per_row": 1.02e6}
    records = changed(lambda r: large if r.head == "dense_gather" and r.tp_size > 1 else {})
    section = wire_section(run_of(tmp_path / "run", records))
    assert any("+2.00 %" in note for note in section.notes)
    frame = section.frame[section.frame["head"] == "dense_gather"]
    assert set(frame.counted_over_sent.round(9)) == {1.02}


def test_bytes_that_were_not_counted_are_missing_and_never_zero(tmp_path: Path) -> None:
    records = changed(lambda r: {"counted_bytes_per_row": None, "counted_reason": "no interface"})
    section = wire_section(run_of(tmp_path / "run", records))
    assert not {"counted_bytes_per_row", "protocol_bytes_per_row"} & set(section.frame)
    assert any("no interface" in note for note in section.notes)


def test_agreement_shows_the_worst_source(run: RunFolder) -> None:
    section = fidelity_section(run)
    assert any("in code (25 states)" in title for title in marks(section.charts))
    row = section.frame[section.frame["head"] == "flashhead"].iloc[0]
    assert row.top1_agreement_low < row.top1_agreement < row.top1_agreement_high


def test_memory_is_compared_with_an_even_share(run: RunFolder) -> None:
    frame = memory_section(run).frame
    row = frame[(frame["head"] == "flashhead") & (frame.tp_size == 2)].iloc[0]
    single = next(r for r in golden() if (r.head, r.tp_size) == ("flashhead", 1))
    assert row.even_share_bytes == single.weight_bytes_per_rank / 2
    assert row.over_even_share == pytest.approx(
        row.weight_bytes_per_rank / row.even_share_bytes - 1
    )


def test_the_workspace_is_that_of_the_batch_size_that_needs_most(tmp_path: Path) -> None:
    assert "workspace_bytes_per_rank" not in memory_section(run_of(tmp_path / "cpu")).frame
    records = changed(lambda r: {"workspace_bytes_per_rank": 1_000 * r.batch_size})
    frame = memory_section(run_of(tmp_path / "cuda", records)).frame
    assert set(frame["workspace_bytes_per_rank"]) == {4_000}


def test_the_crossover_comes_from_the_environment(run: RunFolder) -> None:
    frame = crossover_section(run).frame
    assert list(frame.tp_size) == [1, 1, 1, 2, 2, 2]
    assert frame.scan_over_retrieval.iloc[0] == 4.0


Missing = tuple[Callable[[RunFolder], Section], dict[str, Any], str]
MISSING: list[Missing] = [
    (crossover_section, {"environment": {}}, "environment.json"),
    (crossover_section, {"environment": {"heads": ["flashhead"]}}, "was not measured"),
    (crossover_section, {"environment": {"heads": ["flashhead_auto"]}}, "ended before"),
    (pipeline_section, {}, "bench_pipeline.py"),
    (ranks_section, {"records": [r for r in golden() if r.tp_size == 1]}, "one rank"),
    (fidelity_section, {"records": changed(lambda r: {"top1_agreement": None})}, "--max-states 0"),
    (device_counts_section, {}, "computes on the CPU"),
    (ranges_section, {}, "launch/profile.sh --output"),
    (kernels_section, {}, "launch/profile.sh --counters --output"),
]


@pytest.mark.parametrize(("make", "given", "reason"), MISSING)
def test_a_missing_section_has_a_reason(
    tmp_path: Path, make: Callable[[RunFolder], Section], given: dict[str, Any], reason: str
) -> None:
    section = make(run_of(tmp_path / "run", **given))
    assert section.frame.empty
    assert reason in section.missing


def test_damaged_files_are_named(tmp_path: Path) -> None:
    environment = environment_of(golden()) | {"crossovers": {"1": {"changes_at": [3]}}}
    with pytest.raises(UserError, match=r"environment.json is damaged at crossovers"):
        crossover_section(run_of(tmp_path / "crossover", environment=environment))
    document = pipeline_document()
    del document["results"][0]["measured_bubble"]
    with pytest.raises(UserError, match=r"pipeline.json is damaged"):
        pipeline_section(run_of(tmp_path / "pipeline", pipeline=document))
    run = run_of(tmp_path / "profile")
    (run.folder / "profile").mkdir()
    (run.folder / "profile" / "tp2_1_rank0.json").write_text('{"traceEvents": []}')
    with pytest.raises(UserError, match="none of this project's ranges"):
        ranges_section(run)


def test_gpu_counts_are_beside_the_analytic_bytes_and_missing_ones_named(tmp_path: Path) -> None:
    known = DeviceCount(
        name="nvlink_sent", bytes_per_step=4100.0, analytic_bytes_per_step=4096, reason=None
    )
    unknown = replace(known, name="pcie_sent", bytes_per_step=None, reason="it wrapped")
    counts = {"device_counts": [known, unknown], "device_counts_reason": None}
    section = device_counts_section(run_of(tmp_path / "run", changed(lambda r: counts)))
    assert set(section.frame["counter"]) == {"nvlink_sent"}
    assert set(section.frame["counted_bytes_per_step"]) == {4100}
    assert "pcie_sent is missing because it wrapped." in section.notes


COUNTERS = """"Kernel Name","gpu__time_duration.sum","dram__bytes_read.sum","dram__bytes_write.sum"
"","ns","byte","byte"
"dots_kernel","20000","22000000","0"
"dots_kernel","24000","22000000","0"
"""


def test_a_profile_beside_the_records_is_read(run: RunFolder) -> None:
    folder = run.folder / "profile"
    folder.mkdir()
    spans = (("step", 0, 100), ("head:flashhead", 0, 90), ("head/result", 80, 9))
    event = {"ph": "X", "cat": "user_annotation", "pid": 1, "tid": 1}
    events = [event | {"name": name, "ts": ts, "dur": us} for name, ts, us in spans]
    for rank in (0, 1):
        document = {"distributedInfo": {"rank": rank}, "traceEvents": events}
        (folder / f"tp2_1_rank{rank}.json").write_text(json.dumps(document))
    (folder / "counters_rank0.csv").write_text(COUNTERS)
    ranges = ranges_section(run)
    assert set(ranges.frame["rank"]) == {0, 1}
    assert set(ranges.frame["capture"]) == {"tp2_1"}
    assert "kernels_us" not in ranges.frame
    assert any("kernels_us is missing" in note for note in ranges.notes)
    kernels = kernels_section(run)
    assert kernels.frame["achieved_bytes_per_s"].iloc[0] == pytest.approx(1.0e12, rel=0.02)
