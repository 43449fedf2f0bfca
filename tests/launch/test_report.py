"""launch/report.py as a user runs it: what it writes, how it ends, and what it never touches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest

from flashhead_dist.bench.records import Record
from tests.launch.ground import LAUNCH
from tests.launch.scripts import load_script
from tests.report.run_folders import changed, golden, write_run

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(LAUNCH))
        yield load_script("report")


def few(records: list[Record]) -> list[Record]:
    """Of one head at tp 1 and 2 and one batch size: a page that is quickly drawn."""
    return [r for r in records if (r.head, r.batch_size) == ("flashhead", 1) and r.tp_size < 8]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_run_becomes_a_page_beside_it_and_stays_as_it_was(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", few(golden()))
    before = contents(run)
    given = [str(run), "--json", "--fail-if", "flashhead.top1_agreement<0.9"]
    done = subprocess.run(
        [sys.executable, str(LAUNCH / "report.py"), *given],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    assert document["page"] == str(run / "report" / "report.html")
    assert document["failures"] == []
    assert (run / "report" / "report.html").read_text().startswith("<!doctype html>")
    assert all(Path(path).is_file() for path in document["files"])
    assert before.items() <= contents(run).items()


def test_a_condition_that_holds_ends_with_1_and_the_figure(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", few(changed(lambda r: {"top1_agreement": 0.98})))
    given = [str(run), "--output", str(tmp_path / "out"), "--fail-if"]
    assert script.main([*given, "flashhead.top1_agreement<0.995"]) == 1
    assert "flashhead.top1_agreement is 0.98" in capsys.readouterr().err
    assert (tmp_path / "out" / "report.html").is_file()
    # Once more: an earlier report is replaced.
    assert script.main([*given, "flashhead.top1_agreement<0.975"]) == 0


def test_two_runs_are_compared(script: ModuleType, tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, few(golden())) for name in "ab"]
    assert script.main([*map(str, folders), "--output", str(tmp_path / "out")]) == 0
    found = pd.read_csv(tmp_path / "out" / "comparison.csv")
    assert set(found.run) == {"B"}
    assert set(found.verdict) == {"same"}


FLAWS = ["older schema", "empty", "cut off", "not a run", "condition", "system", "no shape", "size"]


@pytest.mark.parametrize("flaw", FLAWS)
def test_a_mistake_is_one_sentence_and_nothing_is_written(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], flaw: str
) -> None:
    run = write_run(tmp_path / "run", few(golden()))
    (run / "report").mkdir()
    earlier = '<!doctype html><meta name="generator" content="flashhead-dist launch/report.py">'
    (run / "report" / "report.html").write_text(earlier)
    more: list[str] = []
    records = run / "records.jsonl"
    if flaw == "older schema":
        lines = [json.loads(line) for line in records.read_text().splitlines()]
        old = [json.dumps(line | {"schema_version": 1}) for line in lines]
        records.write_text("\n".join(old) + "\n")
    elif flaw == "empty":
        records.write_text("")
    elif flaw == "cut off":
        (run / "environment.json").write_text('{"machine": {')
    elif flaw == "not a run":
        records.unlink()
    else:
        more = {
            "condition": ["--fail-if", "flashhead.fidelity<1"],
            "system": ["--project", "h1000"],
            "no shape": ["--project", "h100-infiniband"],
            "size": ["--tp-sizes", "2"],
        }[flaw]
    before = contents(tmp_path)
    assert script.main([str(run), *more]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ")
    assert len(said.err.splitlines()) == 1
    assert said.out == ""
    assert contents(tmp_path) == before


def test_a_slow_rank_of_three_is_named_on_the_page(script: ModuleType, tmp_path: Path) -> None:
    """A real run in which one rank sleeps 60 ms before each step."""
    arguments = ["--synthetic", "3000,64", "--tp-sizes", "3", "--batch-sizes", "1"]
    arguments += ["--heads", "dense_local_max,flashhead", "--iters", "9", "--max-states", "4"]
    arguments += ["--skip-plots", "--runs-dir", str(tmp_path / "runs")]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "3"]
    done = subprocess.run(
        [*torchrun, str(Path(__file__).parent / "slow_rank.py"), *arguments],
        env=os.environ
        | {"SLOW_RANK": "1", "SLOW_US": "60000", "OMP_NUM_THREADS": "1"}
        | {"FLASHHEAD_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "runs").iterdir()
    assert script.main([str(run)]) == 0
    page = (run / "report" / "report.html").read_text()
    assert "Rank 1 is SLOW at tp 3, batch 1" in page
    ranks = pd.read_csv(run / "report" / "ranks.csv")
    waiting = ranks.filter(like="waiting_us").sum(axis="columns").groupby(ranks["rank"]).min()
    assert waiting[0] > 10_000
    assert waiting[2] > 10_000
    assert waiting[1] < 10_000
