"""Parts of a step, its roofline, and a slow rank that is named while the others wait."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flashhead_dist.bench.records import Record
from flashhead_dist.bench.split import Quantiles, SlowRank
from flashhead_dist.report.runs import Run
from flashhead_dist.report.sections.ranks import ranks_section, slow_ranks
from flashhead_dist.report.sections.roofline import roofline_section
from flashhead_dist.report.sections.split import split_section
from tests.report.made_up import changed, golden, run_of
from tests.report.test_sections import marks

pytest.importorskip("matplotlib")
COMPUTE_US = {"centroids": 600.0, "candidates": 300.0, "other": 100.0}
SLOW_BY_US = 3000.0


def same(us: float) -> Quantiles:
    return Quantiles(us * 0.9, us, us * 1.1)


def with_slow_rank(record: Record, heads: tuple[str, ...]) -> dict[str, Any]:
    """Three ranks, the second of which computes 3 ms longer for some heads; the others wait."""
    slow = record.head in heads
    extra = [0.0, SLOW_BY_US if slow else 0.0, 0.0]
    by_rank: dict[str, list[Quantiles] | None] = {
        part: [same(us)] * 3 for part, us in COMPUTE_US.items()
    }
    by_rank["other"] = [same(COMPUTE_US["other"] + us) for us in extra]
    by_rank["exchange"] = [same(400.0)] * 3
    by_rank["waiting"] = [same(max(extra) - us) for us in extra]
    by_rank["step"] = [same(1400.0 + max(extra))] * 3
    path: dict[str, Quantiles | None] = {
        "step": same(1400.0 + max(extra)),
        "centroids": same(COMPUTE_US["centroids"]),
        "candidates": same(COMPUTE_US["candidates"]),
        "other": same(COMPUTE_US["other"] + max(extra)),
        "exchange": same(400.0),
        "waiting": same(max(extra)),
    }
    split = replace(
        record.split,
        step_us=path,
        by_rank_us=by_rank,
        slow_rank=SlowRank(1, SLOW_BY_US) if slow else None,
    )
    return {
        "tp_size": 3,
        "split": split,
        "compute_us_by_rank": [1000.0 + us for us in extra],
        "weight_bytes_by_rank": record.weight_bytes_by_rank[:1] * 3,
        "peak_bytes_by_rank": record.peak_bytes_by_rank[:1] * 3,
        "read_bytes_by_rank": [1_000_000, 2_000_000, 1_000_000],
        "memory_bandwidth_bytes_per_s_by_rank": [1e9, 2e9, 1e9],
    }


def three_ranks(folder: Path, *heads: str) -> Run:
    two = [record for record in golden() if record.tp_size == 2]
    return run_of(folder, [replace(r, **with_slow_rank(r, heads)) for r in two])


def test_a_slow_rank_is_named_and_the_others_wait(tmp_path: Path) -> None:
    section = ranks_section(three_ranks(tmp_path / "run", "dense_local_max", "flashhead"))
    said = section.notes[0]
    assert said.startswith("Rank 1 is SLOW at tp 3, batch 1: for 2 of 3 heads")
    assert "by 3,000 µs" in said
    assert "the rank that waits longest waits 3,000 µs a step for it" in said
    titles = marks(section.plots[0].svg)
    assert "rank 0: waiting 3,000 µs" in titles
    assert "rank 2: waiting 3,000 µs" in titles
    assert not any(title.startswith("rank 1: waiting") for title in titles)
    assert ">slow<" in section.plots[0].svg
    frame = section.frame
    mine = frame[(frame["head"] == "flashhead") & (frame.batch_size == 1)]
    assert list(mine.measured_waiting_us) == [3000.0, 0.0, 3000.0]
    assert list(mine.over_median_rank) == [1.0, 4.0, 1.0]


def test_a_rank_that_is_slow_for_few_heads_is_not_accused(tmp_path: Path) -> None:
    run = three_ranks(tmp_path / "run", "dense_gather")
    section = ranks_section(run)
    assert slow_ranks(run.records) == []
    assert section.notes[0].startswith("No rank is slow")
    assert ">slow<" not in section.plots[0].svg


def test_one_rank_has_no_other(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", [r for r in golden() if r.tp_size == 1])
    assert ranks_section(run).missing is not None


def test_waiting_of_ranks_that_took_turns_is_projected(tmp_path: Path) -> None:
    frame = ranks_section(run_of(tmp_path / "run")).frame
    assert frame[frame.tp_size == 8].measured_waiting_us.isna().all()
    assert frame[frame.tp_size == 2].projected_waiting_us.isna().all()


def test_the_parts_of_a_step_add_up_to_its_bar(tmp_path: Path) -> None:
    section = split_section(three_ranks(tmp_path / "run", "flashhead"))
    row = section.frame[section.frame["head"] == "flashhead"].iloc[0]
    parts = row.centroids_us + row.candidates_us + row.other_us + row.exchange_us
    assert parts == row.step_us == 4400.0
    assert row.measured_waiting_us == 3000.0
    shown = marks(section.plots[0].svg)
    assert "flashhead: other 3,100 µs, 70 %" in shown
    assert "flashhead: another rank waits 3,000 µs" in shown


def test_an_exchange_that_was_not_measured_is_no_zero(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run")
    frame = split_section(run).frame
    assert frame[frame.tp_size == 8].exchange_us.isna().all()
    assert frame[frame.tp_size == 2].exchange_us.notna().all()
    shown = [
        m for plot in split_section(run).plots if plot.key.endswith("tp8") for m in marks(plot.svg)
    ]
    assert shown
    assert not any("exchange" in title for title in shown)


def test_the_roofline_is_that_of_the_rank_that_computes_longest(tmp_path: Path) -> None:
    records = changed(lambda r: {"roofline_share": 0.9} if r.head == "flashhead" else {})
    section = roofline_section(run_of(tmp_path / "golden", records))
    assert any("90 %" in title for plot in section.plots for title in marks(plot.svg))
    frame = roofline_section(three_ranks(tmp_path / "run", "flashhead")).frame
    row = frame[frame["head"] == "flashhead"].iloc[0]
    assert row.read_bytes == 2_000_000
    assert row.read_bytes_per_s == pytest.approx(2e6 / 4000e-6)
    assert row.memory_bandwidth_bytes_per_s == 2e9
