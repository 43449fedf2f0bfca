"""The page's sections on GPU counters and profiles: what is there, and why what is not is not."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from flashhead_dist.bench.records import read_records
from flashhead_dist.bench.wire import DeviceCount
from flashhead_dist.errors import UserError
from flashhead_dist.report.runs import Run
from flashhead_dist.report.sections.device_counts import device_counts_section
from flashhead_dist.report.sections.profile import kernels_section, ranges_section

DATA = Path(__file__).parent / "data" / "records.jsonl"
COUNTERS = """"Kernel Name","gpu__time_duration.sum","dram__bytes_read.sum","dram__bytes_write.sum"
"","ns","byte","byte"
"dots_kernel","20000","22000000","0"
"dots_kernel","24000","22000000","0"
"""


def run_in(folder: Path, **changes: Any) -> Run:
    records = tuple(dataclasses.replace(r, **changes) for r in read_records(DATA))
    return Run("A", folder, records, {}, None, ())


def write_trace(folder: Path, rank: int) -> None:
    folder.mkdir(exist_ok=True)
    events = [
        {"ph": "X", "cat": "user_annotation", "name": name, "ts": ts, "dur": us, "pid": 1, "tid": 1}
        for name, ts, us in (("step", 0, 100), ("head:flashhead", 0, 90), ("head/result", 80, 9))
    ]
    document = {"distributedInfo": {"rank": rank}, "traceEvents": events}
    (folder / f"tp2_1_rank{rank}.json").write_text(json.dumps(document))


def test_counts_stand_beside_the_analytic_bytes_and_missing_ones_are_named(tmp_path: Path) -> None:
    counts = [
        DeviceCount(
            name="nvlink_sent", bytes_per_step=4100.0, analytic_bytes_per_step=4096, reason=None
        ),
        DeviceCount(
            name="pcie_sent", bytes_per_step=None, analytic_bytes_per_step=4096, reason="it wrapped"
        ),
    ]
    section = device_counts_section(
        run_in(tmp_path, device_counts=counts, device_counts_reason=None)
    )
    assert set(section.frame["counter"]) == {"nvlink_sent"}
    assert set(section.frame["counted_bytes_per_step"]) == {4100}
    assert "pcie_sent is missing, because it wrapped." in section.notes


def test_on_a_cpu_all_counts_are_missing_with_the_reason(tmp_path: Path) -> None:
    section = device_counts_section(run_in(tmp_path))
    assert section.frame.empty
    assert "computes on the CPU" in str(section.missing)


def test_a_profile_beside_the_records_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "profile"
    for rank in (0, 1):
        write_trace(folder, rank)
    (folder / "counters_rank0.csv").write_text(COUNTERS)
    ranges = ranges_section(run_in(tmp_path))
    assert set(ranges.frame["rank"]) == {0, 1}
    assert set(ranges.frame["capture"]) == {"tp2_1"}
    assert "kernels_us" not in ranges.frame
    assert any("kernels_us is missing" in note for note in ranges.notes)
    kernels = kernels_section(run_in(tmp_path))
    assert kernels.frame["achieved_bytes_per_s"].iloc[0] == pytest.approx(1.0e12, rel=0.02)
    assert any("l2_hit_rate is missing" in note for note in kernels.notes)


def test_without_a_profile_the_command_that_takes_one_is_named(tmp_path: Path) -> None:
    assert "launch/profile.sh --output" in str(ranges_section(run_in(tmp_path)).missing)
    assert "--counters --output" in str(kernels_section(run_in(tmp_path)).missing)


def test_a_profile_without_our_ranges_is_a_users_mistake(tmp_path: Path) -> None:
    folder = tmp_path / "profile"
    folder.mkdir()
    (folder / "tp2_1_rank0.json").write_text('{"traceEvents": []}')
    with pytest.raises(UserError, match="none of this project's ranges"):
        ranges_section(run_in(tmp_path))
