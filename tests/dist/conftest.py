"""Real gloo ranks for tests, as processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

RANK_MAIN = Path(__file__).with_name("rank_main.py")


class RankFailedError(Exception):
    """A rank exited with an error: its number and what it wrote to stderr."""

    def __init__(self, rank: int, stderr: str) -> None:
        super().__init__(f"rank {rank} failed:\n{stderr}")
        self.rank = rank
        self.stderr = stderr


def _run_ranks(
    folder: Path, function: Callable[..., Any], world_size: int, *arguments: Any, timeout_s: float
) -> list[Any]:
    torch.save(arguments, folder / "arguments.pt")
    errors = [folder / f"stderr_{rank}" for rank in range(world_size)]
    processes = []
    for rank in range(world_size):
        environment = os.environ | {
            "RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "OMP_NUM_THREADS": "1",
            "RANK_TIMEOUT_S": str(timeout_s),
        }
        file = function.__code__.co_filename
        with errors[rank].open("w") as stderr:
            processes.append(
                subprocess.Popen(
                    [sys.executable, RANK_MAIN, folder, file, function.__name__],
                    env=environment,
                    stderr=stderr,
                )
            )
    try:
        _wait(processes, errors, timeout_s)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [
        torch.load(folder / f"result_{rank}.pt", weights_only=False) for rank in range(world_size)
    ]


def _wait(processes: list[subprocess.Popen[bytes]], errors: list[Path], timeout_s: float) -> None:
    """Return when all ranks have ended well; raise for the first that has not."""
    deadline = time.monotonic() + timeout_s
    running = set(range(len(processes)))
    while running:
        for rank in sorted(running):
            code = processes[rank].poll()
            if code is None:
                continue
            if code != 0:
                raise RankFailedError(rank, errors[rank].read_text())
            running.remove(rank)
        if time.monotonic() > deadline:
            raise TimeoutError(f"ranks {sorted(running)} still run after {timeout_s} s")
        time.sleep(0.02)


@pytest.fixture(scope="session")
def run_ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Any]]:
    """`run_ranks(function, world_size, *arguments, timeout_s=120)` -> every rank's result.

    `function(rank, world_size, *arguments)` is a top-level function of a test file. The first rank
    that fails ends the others and raises RankFailedError.
    """

    def run(
        function: Callable[..., Any], world_size: int, *arguments: Any, timeout_s: float = 120
    ) -> list[Any]:
        folder = tmp_path_factory.mktemp("ranks")
        return _run_ranks(folder, function, world_size, *arguments, timeout_s=timeout_s)

    return run
