"""Run folders that can be read, and what is said of those that cannot."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from flashhead_dist.errors import UserError
from flashhead_dist.report.runs import load_run, load_runs
from tests.report.made_up import environment_of, golden, pipeline_document, write_run


def refusal(*paths: Path) -> str:
    with pytest.raises(UserError) as refused:
        load_runs(list(paths))
    text = str(refused.value)
    assert "\n" not in text
    return text


def test_a_finished_run_has_no_flaws(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path / "run", pipeline=pipeline_document()))
    assert run.flaws == ()
    assert (run.tp_sizes, run.batch_sizes) == ([1, 2, 8], [1, 4])
    assert run.heads == ["dense_gather", "dense_local_max", "flashhead"]
    assert run.pipeline is not None
    found = run.find("flashhead", 2, 4)
    assert found is not None
    assert found.median_us == 4150.0


def test_a_run_may_be_given_by_its_records_file(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    assert load_run(folder / "records.jsonl").folder == folder


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    assert "there is no run at" in refusal(tmp_path / "nowhere")


def test_a_folder_without_records(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert "holds no records.jsonl" in refusal(tmp_path / "run")


def test_an_empty_run(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [], environment={})
    assert "holds no record, as its run ended before the first was measured" in refusal(folder)


def test_a_run_that_only_began_to_write_a_record_is_empty(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [], environment={})
    (folder / "records.jsonl").write_text('{"schema_version": 1, "time')
    assert "holds no record" in refusal(folder)


def test_an_older_schema_is_named_with_file_and_line(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    old = asdict(golden()[0]) | {"schema_version": 0}
    with (folder / "records.jsonl").open("a") as file:
        file.write(json.dumps(old) + "\n")
    said = refusal(folder)
    assert f"line 19 of {folder / 'records.jsonl'}" in said
    assert "its schema_version is 0 and this program reads" in said


def test_a_line_that_is_no_record(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    text = (folder / "records.jsonl").read_text()
    (folder / "records.jsonl").write_text(text.replace("{", "", 1))
    assert f"line 1 of {folder / 'records.jsonl'} is not a record" in refusal(folder)


def test_an_environment_that_was_cut_off(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    text = (folder / "environment.json").read_text()
    (folder / "environment.json").write_text(text[: len(text) // 2])
    assert f"cannot read {folder / 'environment.json'}" in refusal(folder)


@pytest.mark.parametrize("name", ["environment.json", "pipeline.json"])
def test_a_file_that_holds_no_object(tmp_path: Path, name: str) -> None:
    folder = write_run(tmp_path / "run")
    (folder / name).write_text("[1]")
    assert f"{folder / name} holds no JSON object" in refusal(folder)


def test_runs_appended_to_each_other(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [*golden(), golden()[0]])
    assert "holds 2 records of dense_gather at tp 1 and batch 1" in refusal(folder)


def test_records_of_different_runs_in_one_file(tmp_path: Path) -> None:
    first, *rest = golden()
    other = [type(r)(**(asdict(r) | {"commit": "0123456789"})) for r in rest]
    assert "differ in commit (0123456789, abcdef0123)" in refusal(
        write_run(tmp_path / "run", [first, *other])
    )


def test_the_same_run_twice(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    assert "is the same run as" in refusal(folder, folder / "records.jsonl")


def test_what_was_planned_and_never_measured_is_said(tmp_path: Path) -> None:
    records = golden()
    run = load_run(write_run(tmp_path / "run", records[:-3], environment=environment_of(records)))
    (flaw,) = run.flaws
    assert "INCOMPLETE: 3 of 18 planned figures were never measured (tp 8 batch 4)" in flaw


def test_a_cut_off_last_line_and_a_missing_environment_are_said(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    with (folder / "records.jsonl").open("a") as file:
        file.write('{"schema')
    (folder / "environment.json").unlink()
    cut, missing = load_run(folder).flaws
    assert "cut off" in cut
    assert "no environment.json" in missing
    assert len(load_run(folder).records) == 18
