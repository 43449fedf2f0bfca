"""The stress command finds a wrong key, ends a hang and says what it cannot do.

The ranks here are threads with an exchange that torch computes; the kernel needs a GPU for this.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

KERNELS = Path(__file__).resolve().parent.parent.parent / "kernels"
CPU = torch.device("cpu")


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(KERNELS))
    return importlib.import_module("stress_exchange")


class _Threads:
    """An exchange among threads; `faulty_round` of rank 1 leaves its last key as it was."""

    def __init__(self, tp_size: int, faulty_round: int | None = None) -> None:
        self.given: list[Tensor] = [torch.empty(0)] * tp_size
        self.barrier = threading.Barrier(tp_size, timeout=30)
        self.faulty_round = faulty_round

    def end(self, rank: int) -> _End:
        return _End(self, rank)


class _End:
    def __init__(self, threads: _Threads, rank: int) -> None:
        self.threads, self.rank, self.round = threads, rank, 0

    def all_reduce_max(self, keys: Tensor) -> Tensor:
        threads = self.threads
        threads.given[self.rank] = keys.clone()
        threads.barrier.wait()
        merged = torch.stack(threads.given).amax(0)
        threads.barrier.wait()
        faulty = self.rank == 1 and self.round == threads.faulty_round
        self.round += 1
        return keys.copy_(keys if faulty else merged)


@pytest.mark.parametrize("faulty_round", [None, 130])
def test_one_wrong_round_in_many_is_found_and_named(
    command: ModuleType, faulty_round: int | None
) -> None:
    threads, tallies = _Threads(2, faulty_round), {}
    seen: list[int] = []

    def run(rank: int) -> None:
        progress = seen.append if rank == 0 else lambda _: None
        tallies[rank] = command.run_launches(threads.end(rank), rank, 2, 16, 250, 3, CPU, progress)

    workers = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert seen == [100, 200, 250]
    assert tallies[0].wrong == 0
    assert tallies[0].keys == tallies[1].keys > 250
    assert (tallies[1].wrong > 0) == (faulty_round is not None)
    assert tallies[1].first_wrong_round == faulty_round


def test_keys_past_the_count_must_be_left_alone(command: ModuleType) -> None:
    part = command.Part(torch.tensor([[[1, 5, 3], [4, 2, 9]]]), [2])
    assert part.expected(0).tolist() == [[4, 5, 3]]
    assert part.expected(1).tolist() == [[4, 5, 9]]


def test_parts_agree_between_ranks_and_differ_between_rounds(command: ModuleType) -> None:
    one, again = (command.make_part(100, 50, 4, 32, 7) for _ in range(2))
    assert torch.equal(one.rank_keys, again.rank_keys)
    assert one.counts == again.counts
    assert {1, 32} <= set(one.counts)
    assert not torch.equal(one.rank_keys, command.make_part(150, 50, 4, 32, 7).rank_keys)
    assert command.whole_replays(250) == 300


def test_the_kernel_itself_is_stressed_where_it_is_interpreted() -> None:
    script = [sys.executable, str(KERNELS / "stress_exchange.py"), "--simulate", "--ranks", "2"]
    done = subprocess.run(
        [*script, "--rounds", "30", "--capacity", "8"], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SIMULATED" in done.stdout
    assert "2 ranks: 30 launches," in done.stdout
    assert "all right" in done.stdout


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_processes_that_share_a_gpu_are_left_with_the_right_keys() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = str(KERNELS / "stress_exchange.py")
    done = subprocess.run(
        [sys.executable, script, "--ranks", "2", "4", "--rounds", "300"],
        capture_output=True, text=True, env=environment, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("all right") == 2


def _sleep(seconds: float, code: int) -> None:
    time.sleep(seconds)
    sys.exit(code)


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        ([(0.0, 0), (0.0, 0)], None),
        ([(0.0, 0), (60.0, 0)], "rank 0 after 7, rank 1 after 3"),
        ([(60.0, 0), (0.0, 9)], "rank 1 ended with exit code 9"),
    ],
)
def test_a_rank_that_hangs_or_dies_ends_the_watch(
    command: ModuleType, ranks: list[tuple[float, int]], words: str | None
) -> None:
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=_sleep, args=rank) for rank in ranks]
    for process in processes:
        process.start()
    try:
        trouble = command.watch(processes, [7, 3], timeout_s=2.0)
    finally:
        for process in processes:
            process.kill()
            process.join()
    assert trouble is None if words is None else words in trouble


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without CUDA is asked")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "no CUDA device"),
        (["--ranks", "1"], "2 ranks or more"),
        (["--rounds", "0"], "--rounds is 0"),
        (["--capacity", "12"], "not a power of two"),
    ],
)
def test_a_mistake_is_one_sentence(arguments: list[str], words: str) -> None:
    done = subprocess.run(
        [sys.executable, str(KERNELS / "stress_exchange.py"), *arguments],
        capture_output=True, text=True, env=os.environ, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""
