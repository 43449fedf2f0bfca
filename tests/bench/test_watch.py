"""How a run of real ranks under torchrun ends: a failure, a lost or stopped rank, an interrupt."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flashhead_dist.bench.control import LOST_AFTER_VARIABLE, lost_after_s
from flashhead_dist.errors import UserError

SCRIPT = Path(__file__).with_name("watched_ranks.py")
LAUNCH = SCRIPT.parents[2] / "launch"
Start = Callable[..., "Job"]


class Job:
    """Ranks that are at work."""

    def __init__(self, folder: Path, num_ranks: int, how: str) -> None:
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(num_ranks)]
        paths = [str(LAUNCH), os.environ.get("PYTHONPATH", "")]
        self.error_file = folder / "stderr"
        with self.error_file.open("w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, *launcher[: 4 * (num_ranks > 1)], str(SCRIPT), str(folder), how],
                stderr=stderr,
                env=os.environ
                | {"PYTHONPATH": os.pathsep.join(paths), LOST_AFTER_VARIABLE: "3"}
                | {"OMP_NUM_THREADS": "1"},
            )
        files = [folder / f"pid{rank}" for rank in range(num_ranks)]
        deadline_s = time.monotonic() + 120
        while not all(file.exists() and file.read_text() for file in files):
            assert time.monotonic() < deadline_s, self.stderr
            time.sleep(0.05)
        self.pids = [int(file.read_text()) for file in files]

    @property
    def stderr(self) -> str:
        return self.error_file.read_text()

    @property
    def own_traceback(self) -> bool:
        """Whether a traceback names a file of ours; torchrun's own cannot be helped."""
        return f'File "{SCRIPT}"' in self.stderr

    def errors(self) -> list[str]:
        return [line for line in self.stderr.splitlines() if line.startswith("error: ")]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    jobs: list[Job] = []

    def begin(num_ranks: int, how: str) -> Job:
        jobs.append(Job(tmp_path, num_ranks, how))
        return jobs[-1]

    yield begin
    for job in jobs:
        for pid in job.pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        job.process.kill()
        job.process.wait()


def test_the_failure_of_a_rank_is_shown_and_ends_all(start: Start) -> None:
    job = start(3, "raise")
    assert job.process.wait(60) == 1
    assert job.stderr.count("ValueError: a defect of rank 1") == 1
    assert "RuntimeError" not in job.stderr, "what the failure of rank 1 caused on the others"


@pytest.mark.parametrize(("how", "victim"), [("work", 1), ("work", 0), ("wait", 1)])
def test_a_killed_rank_is_named_and_ends_all(start: Start, how: str, victim: int) -> None:
    """In the midst of collectives, or while the others wait in the store."""
    job = start(3, how)
    os.kill(job.pids[victim], signal.SIGKILL)
    start_s = time.monotonic()
    assert job.process.wait(60) == 1
    assert time.monotonic() - start_s < 30
    assert f"(SIGKILL) received by PID {job.pids[victim]}" in job.stderr
    assert len(job.errors()) == 1
    assert "Look in runs/x." in job.errors()[0]
    assert not job.own_traceback


@pytest.mark.parametrize("how", ["work", "wait"])
def test_a_stopped_rank_is_named(start: Start, how: str) -> None:
    job = start(2, how)
    os.kill(job.pids[1], signal.SIGSTOP)
    start_s = time.monotonic()
    while not job.errors():
        assert time.monotonic() - start_s < 30
        time.sleep(0.1)
    os.kill(job.pids[1], signal.SIGCONT)
    assert job.process.wait(60) == 1
    (error,) = job.errors()
    assert "rank 1" in error
    assert "no heartbeat" in error
    assert "Look in runs/x." in error
    assert not job.own_traceback


@pytest.mark.parametrize(("num_ranks", "how"), [(1, "work"), (2, "work"), (2, "wait")])
def test_an_interrupt_is_one_message_and_130(start: Start, num_ranks: int, how: str) -> None:
    job = start(num_ranks, how)
    job.process.send_signal(signal.SIGINT)
    code = job.process.wait(60)
    assert job.errors() == ["error: interrupted. Look in runs/x."]
    assert not job.own_traceback
    if num_ranks == 1:
        assert code == 130


def test_terminate_ends_one_rank(start: Start) -> None:
    job = start(1, "work")
    job.process.terminate()
    assert job.process.wait(60) == 128 + signal.SIGTERM
    assert job.errors() == ["error: ended by SIGTERM. Look in runs/x."]


def test_a_run_that_finishes_says_nothing(start: Start) -> None:
    job = start(3, "finish")
    assert job.process.wait(60) == 0
    assert job.stderr == ""


@pytest.mark.parametrize("text", ["soon", "2", "inf"])
def test_a_wrong_patience_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=LOST_AFTER_VARIABLE):
        lost_after_s({LOST_AFTER_VARIABLE: text})
    assert lost_after_s({LOST_AFTER_VARIABLE: "3"}) == 3
    assert lost_after_s({}) <= 25
