"""launch/report.py as a user runs it: what it writes, how it ends, and what it never touches."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.ground import LAUNCH
from tests.report.made_up import changed, golden, write_run

pytest.importorskip("matplotlib")


def report(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, str(LAUNCH / "report.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "Traceback" not in done.stderr
    return done


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_run_becomes_a_page_beside_it_and_stays_as_it_was(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    before = contents(run)
    done = report(run, "--json", "--fail-if", "dense_gather.top1_agreement<0.9")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    assert document["page"] == str(run / "report" / "report.html")
    assert document["failures"] == []
    assert (run / "report" / "report.html").read_text().startswith("<!doctype html>")
    assert all(Path(path).is_file() for path in document["files"])
    assert before.items() <= contents(run).items()
    # Once more: an earlier report is replaced.
    assert report(run).returncode == 0


def test_a_condition_that_holds_ends_with_1_and_the_figure(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", changed(lambda r: {"top1_agreement": 0.98}))
    done = report(run, "--fail-if", "flashhead.top1_agreement<0.995", "--output", tmp_path / "out")
    assert done.returncode == 1
    assert "flashhead.top1_agreement is 0.98" in done.stderr
    assert (tmp_path / "out" / "report.html").is_file()


def test_two_runs_are_compared(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / "a"), write_run(tmp_path / "b")]
    done = report(*folders, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "comparison.csv").is_file()


@pytest.mark.parametrize("flaw", ["older schema", "empty", "cut off", "not a run", "condition"])
def test_a_mistake_is_one_sentence_and_nothing_is_written(tmp_path: Path, flaw: str) -> None:
    run = write_run(tmp_path / "run", golden())
    assert report(run).returncode == 0
    more: list[str] = []
    records = run / "records.jsonl"
    if flaw == "older schema":
        text = records.read_text()
        version = json.loads(text.splitlines()[0])["schema_version"]
        changed_text = text.replace(f'"schema_version": {version}', '"schema_version": 0')
        records.write_text(changed_text)
    elif flaw == "empty":
        records.write_text("")
    elif flaw == "cut off":
        (run / "environment.json").write_text('{"machine": {')
    elif flaw == "not a run":
        records.unlink()
    else:
        more = ["--fail-if", "flashhead.fidelity<1"]
    before = contents(tmp_path)
    done = report(run, *more)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""
    assert contents(tmp_path) == before
