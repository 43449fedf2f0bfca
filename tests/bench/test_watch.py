"""A rank that dies, or a signal, ends every rank at once, even one stuck in native code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# A stuck rank waits for a key that never comes: native code that runs no Python signal handler.
RANK = """
import json, os, sys, time
from datetime import timedelta
from pathlib import Path
from torch.distributed import FileStore
from flashhead_dist.bench.watch import PeerWatch

folder, rank, world_size, how = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
store = FileStore(str(folder / "store"), world_size)
store.set(f"pid{rank}", str(os.getpid()))
pids = {r: int(store.get(f"pid{r}")) for r in range(world_size)}
try:
    with PeerWatch(rank, pids, lambda: " Look in runs/x."):
        (folder / f"ready{rank}").touch()
        if how == "stuck":
            store.wait(["never"], timedelta(hours=1))
        elif how == "broken link":
            time.sleep(1.5)
            raise RuntimeError("connection closed by peer")
        elif how == "python":
            while True:
                time.sleep(0.05)
except KeyboardInterrupt:
    sys.exit(130)
# Leave in turn: a rank that has stopped watching must not be missed.
time.sleep(0.3 * rank)
"""

Start = Callable[..., list[subprocess.Popen[str]]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    running: list[subprocess.Popen[str]] = []

    def launch(world_size: int, how: str) -> list[subprocess.Popen[str]]:
        for rank in range(world_size):
            command = [sys.executable, "-c", RANK, str(tmp_path), str(rank), str(world_size), how]
            running.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
        deadline = time.monotonic() + 60
        while not all((tmp_path / f"ready{rank}").exists() for rank in range(world_size)):
            assert time.monotonic() < deadline, "the ranks do not start"
            time.sleep(0.02)
        return running

    yield launch
    for process in running:
        process.kill()
        process.communicate()


def ends(processes: list[subprocess.Popen[str]]) -> tuple[list[int], str, float]:
    """Exit codes, all that was said, and how long it took."""
    start_s = time.monotonic()
    said = "".join(process.communicate(timeout=30)[1] for process in processes)
    return [process.returncode for process in processes], said, time.monotonic() - start_s


def test_a_killed_rank_is_named_once_and_ends_the_stuck_ones(start: Start) -> None:
    ranks = start(3, "stuck")
    os.kill(ranks[1].pid, signal.SIGKILL)
    codes, said, took_s = ends(ranks)
    assert codes == [1, -signal.SIGKILL, 1]
    assert said.count(f"rank 1 (pid {ranks[1].pid}) ended before the run did") == 1
    assert "Look in runs/x." in said
    assert took_s < 10


def test_the_death_of_the_first_rank_is_told_by_the_second(start: Start) -> None:
    ranks = start(2, "stuck")
    os.kill(ranks[0].pid, signal.SIGKILL)
    codes, said, _ = ends(ranks)
    assert codes == [-signal.SIGKILL, 1]
    assert "rank 0" in said


def test_an_exception_that_a_death_caused_is_not_shown(start: Start) -> None:
    """gloo raises in the survivors at once; here they raise when the death is long past."""
    ranks = start(2, "broken link")
    os.kill(ranks[0].pid, signal.SIGKILL)
    codes, said, _ = ends(ranks)
    assert codes == [-signal.SIGKILL, 1]
    assert "rank 0" in said
    assert "Traceback" not in said


def test_an_exception_of_our_own_is_shown(start: Start) -> None:
    codes, said, _ = ends(start(1, "broken link"))
    assert codes == [1]
    assert "RuntimeError: connection closed by peer" in said


@pytest.mark.parametrize("how", ["stuck", "python"])
def test_interrupt_ends_every_rank_with_130_and_one_sentence(start: Start, how: str) -> None:
    ranks = start(2, how)
    for process in ranks:
        process.send_signal(signal.SIGINT)
    codes, said, took_s = ends(ranks)
    assert codes == [130, 130]
    assert said.count("interrupted.") == 1
    assert "ended before" not in said
    assert "Traceback" not in said
    assert took_s < 10


def test_terminate_ends_a_stuck_rank(start: Start) -> None:
    ranks = start(1, "stuck")
    ranks[0].terminate()
    codes, said, took_s = ends(ranks)
    assert codes == [128 + signal.SIGTERM]
    assert "ended by SIGTERM" in said
    assert took_s < 10


def test_an_orderly_end_is_no_death(start: Start) -> None:
    """All stop watching at about the same time, then leave one after the other."""
    codes, said, _ = ends(start(2, "finish"))
    assert codes == [0, 0]
    assert said == ""
