"""Records: the schema, a file that stays readable, and errors that say what is wrong with one."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from flashhead_dist.bench.records import Record, RecordWriter, make_run_folder, read_records
from flashhead_dist.errors import UserError

DATA = Path(__file__).parents[1] / "report" / "data" / "records.jsonl"
DOCUMENT = Path(__file__).parents[2] / "docs" / "reference" / "records.md"
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def test_golden_records_are_read_whole() -> None:
    records = read_records(DATA)
    assert len(records) == 18
    assert {record.head for record in records} == {"dense_gather", "dense_local_max", "flashhead"}
    assert [r.measured for r in records if r.tp_size == 8] == [False] * 6


def test_writing_and_reading_gives_the_same_records(tmp_path: Path) -> None:
    records = read_records(DATA)
    with RecordWriter(tmp_path / "records.jsonl") as writer:
        for record in records:
            writer.write(record)
    assert writer.num_written == 18
    assert read_records(tmp_path) == records


def test_records_of_before_a_key_with_a_default_are_read() -> None:
    """The golden file was written before there was a threshold of escalation."""
    assert '"escalate_below"' not in DATA.read_text()
    assert {record.escalate_below for record in read_records(DATA)} == {None}


def test_every_key_is_documented() -> None:
    text = DOCUMENT.read_text()
    missing = [f.name for f in dataclasses.fields(Record) if f"`{f.name}`" not in text]
    assert missing == []


def test_a_line_cut_short_is_passed_over(tmp_path: Path) -> None:
    whole = DATA.read_text()
    (tmp_path / "records.jsonl").write_text(whole[:-40])
    assert len(read_records(tmp_path)) == 17


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda line: line.replace('"head"', '"heed"'), "lacks head"),
        (
            lambda line: line.replace('{"schema_version": 2', '{"extra": 2, "schema_version": 2'),
            "extra",
        ),
        (lambda line: line.replace('"schema_version": 2', '"schema_version": 7'), "update this"),
        (
            lambda line: line.replace('"schema_version": 2', '"schema_version": 1'),
            r"schema_version is 1 and this program reads 2: measure again.*commit abcdef0123",
        ),
        (lambda line: line.replace('"by_rank_us"', '"by_rank"'), "by_rank_us"),
        (lambda line: line.replace('"device_counts": []', '"device_counts": [{"a": 1}]'), "line 2"),
        (lambda line: line[:100], "line 2"),
        (lambda line: "[]", "line 2"),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, damage: object, message: str) -> None:
    lines = DATA.read_text().splitlines()
    lines[1] = damage(lines[1])  # type: ignore[operator]
    path = tmp_path / "records.jsonl"
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=message) as caught:
        read_records(path)
    assert "line 2" in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing\.jsonl"):
        read_records(tmp_path / "nothing.jsonl")


def test_projected_and_measured_cannot_be_confused() -> None:
    record = read_records(DATA)[0]
    with pytest.raises(ValueError, match="no projection"):
        dataclasses.replace(record, projection="somehow")
    with pytest.raises(ValueError, match="how it was projected"):
        dataclasses.replace(record, measured=False)


def test_a_number_that_json_lacks_is_refused() -> None:
    record = dataclasses.replace(read_records(DATA)[0], compute_us=float("nan"))
    with pytest.raises(ValueError, match="not JSON compliant"):
        record.as_json_line()


def test_records_survive_a_kill(tmp_path: Path) -> None:
    """A process writes two records and is killed while it still has the file open."""
    path = tmp_path / "records.jsonl"
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from flashhead_dist.bench.records import RecordWriter, read_records\n"
        "writer = RecordWriter(Path(sys.argv[1]))\n"
        "for record in read_records(Path(sys.argv[2]))[:2]: writer.write(record)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path), str(DATA)], timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert len(read_records(path)) == 2


def test_a_full_disk_is_a_sentence(tmp_path: Path) -> None:
    """/dev/full refuses every write as a full disk does."""
    path = tmp_path / "records.jsonl"
    path.symlink_to("/dev/full")
    record = read_records(DATA)[0]
    with (
        pytest.raises(UserError, match="No space left on device") as caught,
        RecordWriter(path) as w,
    ):
        w.write(record)
    assert "--runs-dir" in str(caught.value)


def test_run_folders_are_named_and_never_shared(tmp_path: Path) -> None:
    first = make_run_folder(tmp_path / "runs", "cpu-2c", "abc", {"a": 1}, NOW)
    second = make_run_folder(tmp_path / "runs", "cpu-2c", "abc", {"a": 1}, NOW)
    assert first.name == "2026-01-02T03-04-05_cpu-2c_abc"
    assert second.name == "2026-01-02T03-04-05_cpu-2c_abc_2"
    assert json.loads((first / "environment.json").read_text()) == {"a": 1}


def test_a_file_in_the_place_of_the_runs_folder_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises(UserError, match="runs-dir"):
        make_run_folder(tmp_path / "runs", "cpu-2c", "abc", {}, NOW)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_runs_folder_is_a_sentence(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="Permission denied"):
        make_run_folder(tmp_path / "runs", "cpu-2c", "abc", {}, NOW)
