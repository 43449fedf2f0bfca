"""Run folders that can be read, and those that are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import pytest

from flashhead_dist.errors import UserError
from flashhead_dist.report.runs import (
    load_run,
    load_runs,
    records_frame,
    setting_frame,
    warnings_of,
    write_summary,
)
from tests.report.run_folders import (
    changed,
    environment_of,
    golden,
    pipeline_document,
    run_of,
    write_run,
)


def test_a_finished_run_has_no_flaws(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path / "run", pipeline=pipeline_document()))
    assert run.flaws == ()
    assert (run.tp_sizes, run.batch_sizes) == ([1, 2, 8], [1, 4])
    assert run.heads == ["dense_gather", "dense_local_max", "flashhead"]
    assert run.pipeline is not None
    assert load_run(run.folder / "records.jsonl").folder == run.folder


def older_schema(folder: Path) -> None:
    with (folder / "records.jsonl").open("a") as file:
        file.write(json.dumps(asdict(golden()[0]) | {"schema_version": 0}) + "\n")


def damaged_line(folder: Path) -> None:
    text = (folder / "records.jsonl").read_text()
    (folder / "records.jsonl").write_text(text.replace("{", "", 1))


def cut_environment(folder: Path) -> None:
    text = (folder / "environment.json").read_text()
    (folder / "environment.json").write_text(text[: len(text) // 2])


def appended(folder: Path) -> None:
    text = (folder / "records.jsonl").read_text()
    (folder / "records.jsonl").write_text(text + text)


def mixed(folder: Path) -> None:
    text = (folder / "records.jsonl").read_text()
    (folder / "records.jsonl").write_text(text.replace("abcdef0123", "0123456789", 1))


FLAWS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no records": (lambda folder: (folder / "records.jsonl").unlink(), "holds no records.jsonl"),
    "empty": (lambda folder: (folder / "records.jsonl").write_text(""), "holds no record"),
    "only begun": (lambda folder: (folder / "records.jsonl").write_text('{"sch'), "no record"),
    "older schema": (older_schema, "line 19 of .*schema_version is 0"),
    "damaged line": (damaged_line, "line 1 of .*records.jsonl is not a record"),
    "cut environment": (cut_environment, "cannot read .*environment.json"),
    "no object": (lambda folder: (folder / "pipeline.json").write_text("[1]"), "pipeline.json"),
    "appended": (appended, "2 records of dense_gather at tp 1 and batch 1"),
    "mixed": (mixed, "differ in commit .0123456789, abcdef0123"),
}


@pytest.mark.parametrize("flaw", FLAWS)
def test_a_folder_that_cannot_be_trusted_is_refused_in_one_line(tmp_path: Path, flaw: str) -> None:
    spoil, reason = FLAWS[flaw]
    folder = write_run(tmp_path / "run")
    spoil(folder)
    with pytest.raises(UserError, match=reason) as refused:
        load_run(folder)
    assert "\n" not in str(refused.value)


def test_a_missing_run_and_the_same_run_twice_are_refused(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    with pytest.raises(UserError, match="no run at"):
        load_run(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is the same run as"):
        load_runs([folder, folder / "records.jsonl"])


def test_cells_that_were_planned_and_never_measured_are_a_flaw(tmp_path: Path) -> None:
    records = golden()
    run = load_run(write_run(tmp_path / "run", records[:-3], environment=environment_of(records)))
    (flaw,) = run.flaws
    assert "3 of 18" in flaw
    assert "tp 8 batch 4" in flaw


def test_a_cut_off_last_line_and_a_missing_environment_are_flaws(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    with (folder / "records.jsonl").open("a") as file:
        file.write('{"schema')
    (folder / "environment.json").unlink()
    assert len(load_run(folder).flaws) == 2
    assert len(load_run(folder).records) == 18


def test_warnings_name_synthetic_models_shared_cores_and_uncommitted_code(tmp_path: Path) -> None:
    records = changed(lambda r: {"synthetic": True, "commit": "abc-dirty"})
    synthetic, oversubscribed, uncommitted = warnings_of(run_of(tmp_path / "run", records))
    assert "SYNTHETIC" in synthetic
    assert "tp 8 (8 ranks on 2 cores)" in oversubscribed
    assert "abc-dirty" in uncommitted


def test_facts_that_differ_between_runs_are_marked(tmp_path: Path) -> None:
    other = changed(lambda r: {"commit": "0123456789"})
    runs = load_runs([write_run(tmp_path / "one"), write_run(tmp_path / "two", other)])
    frame = setting_frame(runs).set_index("fact")
    assert frame.differs["commit"]
    assert not frame.differs["model"]


def test_the_summary_keeps_measured_and_projected_apart(tmp_path: Path) -> None:
    frame = pd.read_csv(write_summary(golden()[::-1], tmp_path))
    assert frame.batch_size.tolist() == [1] * 9 + [4] * 9
    assert frame.tp_size.tolist()[:9] == [1] * 3 + [2] * 3 + [8] * 3
    projected, measured = frame[frame.tp_size == 8], frame[frame.tp_size != 8]
    assert projected.filter(like="measured_").isna().all(axis=None)
    assert projected.projected_median_us.notna().all()
    assert measured.filter(like="projected_").isna().all(axis=None)
    assert "median_us" not in frame.columns
    one = frame[(frame["head"] == "flashhead") & (frame.tp_size == 2) & (frame.batch_size == 1)]
    assert one.measured_median_us.item() == 2150
    assert one.measured_scaling_efficiency.item() == pytest.approx(4000 / 2150 / 2)


def test_a_folder_that_is_gone_is_a_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--runs-dir"):
        write_summary(golden(), tmp_path / "gone")


def test_the_roofline_is_that_of_the_rank_that_computes_longest() -> None:
    records = changed(
        lambda r: (
            {
                "compute_us_by_rank": [1000.0, 4000.0],
                "read_bytes_by_rank": [1_000_000, 2_000_000],
                "memory_bandwidth_bytes_per_s_by_rank": [1e9, 2e9],
            }
            if r.tp_size == 2
            else {}
        )
    )
    row = records_frame(records).query("tp_size == 2").iloc[0]
    assert row.read_bytes == 2_000_000
    assert row.read_bytes_per_s == pytest.approx(2e6 / 4000e-6)
    assert row.memory_bandwidth_bytes_per_s == 2e9
