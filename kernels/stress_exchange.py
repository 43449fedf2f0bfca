"""Exchange keys between processes on one GPU, ten thousand times over, and check every key.

    python kernels/stress_exchange.py                           2, 4 and 8 ranks on one GPU
    python kernels/stress_exchange.py --ranks 2 --rounds 500    a quick look
    python kernels/stress_exchange.py --spread                  rank r on GPU r

Each rank is a process. First every round is a launch, with ranks stalled at random; then rounds are
replayed from a CUDA graph. Batches vary from 1 to the capacity. Keys are random with ties, empty
ones and both ends of int64, and known to every rank, so that each compares every key it is left
with.

Processes that share a GPU take turns on it, and a round costs a turn of each: this shows that keys
are right and nothing hangs, and says nothing of speed. Ranks on one GPU need
TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES=1, which this command sets for its ranks.

Exit codes: 0 all keys right; 1 a wrong key, a rank that died, or no progress for --timeout seconds;
2 a mistake in what was given, no CUDA, or no symmetric memory; 130 after Ctrl-C.

Not run on a GPU yet.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from flashhead_kernels.exchange_choice import (
    ExchangeFailedError,
    ExchangeMethod,
    ExchangeUnavailableError,
    choose_exchange,
)
from flashhead_kernels.exchange_layout import DEFAULT_CAPACITY
from flashhead_kernels.symmetric import SHARED_DEVICE_VARIABLE
from stress_rounds import Tally, run_graph, run_launches, whole_replays

INTERRUPTED = 130
_UNAVAILABLE = 3


@dataclass(frozen=True)
class Job:
    """What every rank of a run is told."""

    tp_size: int
    rounds: int
    capacity: int
    seed: int
    spread: bool
    folder: str
    timeout_s: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    options = _parse(arguments)
    mistake = _mistake(options)
    if mistake is not None:
        print(f"stress_exchange: {mistake}", file=sys.stderr)
        return 2
    print(f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}")
    try:
        for tp_size in options.ranks:
            code = _run(tp_size, options)
            if code:
                return code
    except KeyboardInterrupt:
        print("stress_exchange: interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0


def watch(
    processes: Sequence[BaseProcess], progress: Sequence[int], timeout_s: float
) -> str | None:
    """Wait until all have ended well; what went wrong otherwise, told at once.

    progress: rounds done, by rank; a sequence that the ranks change. Time counts from the last
    change of any of them.
    """
    seen, since_s = list(progress), time.monotonic()
    while any(process.is_alive() for process in processes):
        died = [r for r, process in enumerate(processes) if process.exitcode not in (None, 0)]
        if died:
            break
        if list(progress) != seen:
            seen, since_s = list(progress), time.monotonic()
        if time.monotonic() - since_s > timeout_s:
            places = ", ".join(f"rank {r} after {rounds}" for r, rounds in enumerate(seen))
            return f"no rank has checked a round for {timeout_s:g} s ({places}): they hang"
        time.sleep(0.05)
    for rank, process in enumerate(processes):
        if process.exitcode not in (None, 0):
            return f"rank {rank} ended with exit code {process.exitcode}"
    return None


def _run(tp_size: int, options: argparse.Namespace) -> int:
    context: Any = mp.get_context("spawn")
    progress = context.Array("q", tp_size)
    answers = context.SimpleQueue()
    start_s = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        job = Job(
            tp_size, options.rounds, options.capacity, options.seed, options.spread, folder,
            options.timeout,
        )  # fmt: skip
        processes = [
            context.Process(target=_rank, args=(rank, job, progress, answers))
            for rank in range(tp_size)
        ]
        try:
            for process in processes:
                process.start()
            trouble = watch(processes, progress, options.timeout)
            unavailable = any(process.exitcode == _UNAVAILABLE for process in processes)
        finally:
            for process in processes:
                if process.pid is not None:
                    process.kill()
                    process.join()
    if trouble is not None:
        # A rank that could not have symmetric memory has said so itself.
        if not unavailable:
            print(f"stress_exchange: {tp_size} ranks: {trouble}", file=sys.stderr)
        return 2 if unavailable else 1
    tallies: list[tuple[int, str, Tally]] = [answers.get() for _ in range(2 * tp_size)]
    return _report(tp_size, options.rounds, tallies, time.monotonic() - start_s)


def _report(
    tp_size: int, rounds: int, tallies: list[tuple[int, str, Tally]], seconds: float
) -> int:
    """Print a line for a run; 1 where a key was wrong."""
    keys = sum(tally.keys for _, _, tally in tallies)
    wrong = sum(tally.wrong for _, _, tally in tallies)
    for rank, kind, tally in sorted(tallies, key=lambda item: item[:2]):
        if tally.wrong:
            print(
                f"  rank {rank}, {kind}: {tally.wrong:,} wrong, first in round "
                f"{tally.first_wrong_round}"
            )
    verdict = f"{wrong:,} WRONG" if wrong else "all right"
    print(
        f"{tp_size} ranks: {rounds:,} launches and {whole_replays(rounds):,} rounds in a CUDA "
        f"graph, {keys:,} keys compared, {verdict} ({seconds:.0f} s)"
    )
    return 1 if wrong else 0


def _rank(rank: int, job: Job, progress: Any, answers: Any) -> None:
    """One process."""
    torch.set_num_threads(1)
    if not job.spread:
        os.environ[SHARED_DEVICE_VARIABLE] = "1"
    device = torch.device("cuda", rank if job.spread else 0)
    torch.cuda.set_device(device)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{Path(job.folder) / 'store'}",
        rank=rank,
        world_size=job.tp_size,
        timeout=timedelta(seconds=job.timeout_s),
    )
    assert dist.group.WORLD is not None
    try:
        choice = choose_exchange(
            dist.group.WORLD, device, ExchangeMethod.SYMMETRIC, capacity=job.capacity
        )
    except (ExchangeUnavailableError, ExchangeFailedError) as error:
        if rank == 0:
            print(f"stress_exchange: {error}", file=sys.stderr, flush=True)
        # The others are to reach their own exit before this one is seen.
        dist.barrier()
        sys.exit(_UNAVAILABLE if isinstance(error, ExchangeUnavailableError) else 1)
    assert choice.symmetric is not None
    done = 0

    def advance(rounds: int) -> None:
        progress[rank] = done + rounds

    for kind, run in (("launches", run_launches), ("graph", run_graph)):
        tally = run(
            choice.symmetric, rank, job.tp_size, job.capacity, job.rounds, job.seed, device, advance
        )
        answers.put((rank, kind, tally))
        done += job.rounds
    # A rank that leaves unmaps memory that others may still write.
    torch.cuda.synchronize(device)
    dist.barrier()
    dist.destroy_process_group()


def _mistake(options: argparse.Namespace) -> str | None:
    for value, name in ((options.rounds, "--rounds"), (options.timeout, "--timeout")):
        if value <= 0:
            return f"{name} is {value}: give more than 0"
    if min(options.ranks) < 2:
        return f"--ranks {min(options.ranks)}: an exchange takes 2 ranks or more"
    if options.capacity < 1 or options.capacity & (options.capacity - 1):
        return f"--capacity {options.capacity} is not a power of two"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device here, and this stresses one: run it where a GPU is"
    count = torch.cuda.device_count()
    if options.spread and max(options.ranks) > count:
        return f"--spread takes a GPU a rank, and there are {count}: leave it out or give --ranks"
    return None


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="stress_exchange.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--ranks", type=int, nargs="+", default=[2, 4, 8], metavar="P",
        help="group sizes, one run each (default: 2 4 8)",
    )  # fmt: skip
    parser.add_argument(
        "--rounds", type=int, default=10_000, metavar="N",
        help="rounds of each kind, launches and graph; the graph's are made up to hundreds "
        "(default: 10000)",
    )  # fmt: skip
    parser.add_argument(
        "--capacity", type=int, default=DEFAULT_CAPACITY, metavar="KEYS",
        help=f"keys that a round may have at most, a power of two (default: {DEFAULT_CAPACITY})",
    )  # fmt: skip
    parser.add_argument(
        "--timeout", type=float, default=180.0, metavar="SECONDS",
        help="time without progress of any rank after which all are ended (default: 180)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the keys (default: 0)")
    parser.add_argument(
        "--spread", action="store_true", help="rank r on GPU r, not all on the first"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
