"""Exchange keys between processes on one GPU, ten thousand times over, and check every key.

    python kernels/stress_exchange.py                           2, 4 and 8 ranks on one GPU
    python kernels/stress_exchange.py --ranks 2 --rounds 500    a quick look
    python kernels/stress_exchange.py --spread                  rank r on GPU r
    python kernels/stress_exchange.py --simulate --rounds 20    interpreted on the CPU, no graph

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
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from flashhead_dist.exchange import (
    ExchangeFailedError,
    ExchangeMethod,
    ExchangeUnavailableError,
    choose_exchange,
)
from flashhead_dist.symmetric import SHARED_DEVICE_VARIABLE, SymmetricExchange
from flashhead_kernels.keys import DEFAULT_CAPACITY, EMPTY_KEY, merged_keys, num_words

INTERRUPTED = 130
_UNAVAILABLE = 3
ROUNDS_A_CHECK = 100
_LONGEST_STALL_S = 2e-3
_LONGEST_STALL_CYCLES = 2_000_000


@dataclass(frozen=True)
class Job:
    """What every rank of a run is told."""

    tp_size: int
    rounds: int
    capacity: int
    seed: int
    spread: bool
    simulate: bool
    folder: str
    timeout_s: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    options = _parse(arguments)
    mistake = _mistake(options)
    if mistake is not None:
        print(f"stress_exchange: {mistake}", file=sys.stderr)
        return 2
    where = "SIMULATED on the CPU" if options.simulate else torch.cuda.get_device_name(0)
    print(f"{where}, torch {torch.__version__}")
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
    words = None
    if options.simulate:
        os.environ["TRITON_INTERPRET"] = "1"
        words = torch.zeros(tp_size, num_words(tp_size, options.capacity), dtype=torch.int64)
        words.share_memory_()  # type: ignore[no-untyped-call]
    start_s = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        job = Job(
            tp_size, options.rounds, options.capacity, options.seed, options.spread,
            options.simulate, folder, options.timeout,
        )  # fmt: skip
        processes = [
            context.Process(target=_rank, args=(rank, job, words, progress, answers))
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
    kinds = 1 if options.simulate else 2
    tallies: list[tuple[int, str, Tally]] = [answers.get() for _ in range(kinds * tp_size)]
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
    graphs = {kind for _, kind, _ in tallies} == {"launches", "graph"}
    replayed = f" and {whole_replays(rounds):,} rounds in a CUDA graph" if graphs else ""
    print(
        f"{tp_size} ranks: {rounds:,} launches{replayed}, {keys:,} keys compared, {verdict} "
        f"({seconds:.0f} s)"
    )
    return 1 if wrong else 0


def _rank(rank: int, job: Job, words: Tensor | None, progress: Any, answers: Any) -> None:
    """One process. words: of all ranks, in shared memory, where the kernel is interpreted."""
    torch.set_num_threads(1)
    if words is not None:
        addresses = torch.tensor([own.data_ptr() for own in words])
        exchange = SymmetricExchange(words[rank], addresses, rank, job.capacity)

        def advance_simulated(rounds: int) -> None:
            progress[rank] = rounds

        cpu = torch.device("cpu")
        tally = run_launches(
            exchange, rank, job.tp_size, job.capacity, job.rounds, job.seed, cpu, advance_simulated
        )
        answers.put((rank, "launches", tally))
        return
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
    if options.simulate:
        return "--simulate has no GPU to --spread over" if options.spread else None
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
    parser.add_argument(
        "--simulate", action="store_true", help="no GPU: the kernel interpreted, memory shared"
    )
    return parser.parse_args(arguments)


class Exchange(Protocol):
    """One rank's end of an exchange."""

    def all_reduce_max(self, keys: Tensor) -> Tensor:
        """Elementwise maximum over the ranks, in place."""


@dataclass
class Tally:
    """Keys compared and keys that were wrong, and the first round in which one was."""

    keys: int = 0
    wrong: int = 0
    first_wrong_round: int | None = None


@dataclass(frozen=True)
class Part:
    """Consecutive rounds: the keys of all ranks, and how many of them each round exchanges.

    rank_keys: int64 `[rounds, P, capacity]`. counts: keys of a round, 1 to capacity.
    """

    rank_keys: Tensor
    counts: list[int]

    def expected(self, rank: int) -> Tensor:
        """`rank`'s keys `[rounds, capacity]` afterwards: those past the count are untouched."""
        merged = merged_keys(self.rank_keys.transpose(0, 1))
        own = self.rank_keys[:, rank].clone()
        lanes = torch.arange(own.shape[1])
        return torch.where(lanes < torch.tensor(self.counts).unsqueeze(1), merged, own)


def make_part(first_round: int, rounds: int, tp_size: int, capacity: int, seed: int) -> Part:
    """The same part on every rank: random keys with ties, no candidate and both ends of int64."""
    draw = torch.Generator().manual_seed(seed * 1_000_003 + first_round)
    shape = (rounds, tp_size, capacity)
    keys = torch.randint(-(2**63), 2**63 - 1, shape, generator=draw)
    awkward = torch.tensor([EMPTY_KEY, EMPTY_KEY + 1, -1, 0, 1, 2**63 - 1])
    picks = torch.randint(0, len(awkward), shape, generator=draw)
    keys = torch.where(torch.rand(shape, generator=draw) < 0.2, awkward[picks], keys)
    return Part(keys, _counts(rounds, capacity))


def run_launches(
    exchange: Exchange,
    rank: int,
    tp_size: int,
    capacity: int,
    rounds: int,
    seed: int,
    device: torch.device,
    progress: Callable[[int], None],
) -> Tally:
    """Launch each round by itself, with stalls of this rank's own on the host and on the device.

    progress: told the rounds done, after each check.
    """
    tally = Tally()
    stalls = random.Random(seed * 1009 + rank)
    for first in range(0, rounds, ROUNDS_A_CHECK):
        part = make_part(first, min(ROUNDS_A_CHECK, rounds - first), tp_size, capacity, seed)
        keys = part.rank_keys[:, rank].to(device, copy=True).contiguous()
        for row, count in zip(keys, part.counts, strict=True):
            _stall(stalls, tp_size, device)
            exchange.all_reduce_max(row[:count])
        _compare(tally, keys, part, rank, first)
        progress(first + len(part.counts))
    return tally


def run_graph(
    exchange: Exchange,
    rank: int,
    tp_size: int,
    capacity: int,
    rounds: int,
    seed: int,
    device: torch.device,
    progress: Callable[[int], None],
) -> Tally:
    """Capture ROUNDS_A_CHECK rounds in one CUDA graph; replay it until `rounds` are done."""
    tally = Tally()
    keys = torch.zeros(ROUNDS_A_CHECK, capacity, dtype=torch.int64, device=device)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize(device)
    with torch.cuda.graph(graph):
        for row, count in zip(keys, _counts(ROUNDS_A_CHECK, capacity), strict=True):
            exchange.all_reduce_max(row[:count])
    stalls = random.Random(seed * 2003 + rank)
    for first in range(0, rounds, ROUNDS_A_CHECK):
        # Round numbers of their own, so that no answer of the launches fits.
        part = make_part(rounds + first, ROUNDS_A_CHECK, tp_size, capacity, seed)
        keys.copy_(part.rank_keys[:, rank])
        _stall(stalls, tp_size, device)
        graph.replay()
        _compare(tally, keys, part, rank, first)
        progress(first + ROUNDS_A_CHECK)
    return tally


def whole_replays(rounds: int) -> int:
    """Rounds that `run_graph` runs: `rounds`, made up to whole replays."""
    return -(-rounds // ROUNDS_A_CHECK) * ROUNDS_A_CHECK


def _counts(rounds: int, capacity: int) -> list[int]:
    """Batches of 1, of the capacity and between, in an order that does not repeat with two."""
    sizes = sorted({1, 2, 3, 8, 32, capacity // 2 + 1, capacity - 1, capacity} - {0})
    fitting = [size for size in sizes if size <= capacity]
    return [random.Random(i).choice(fitting) for i in range(rounds)]


def _stall(draw: random.Random, tp_size: int, device: torch.device) -> None:
    chance = draw.random()
    if chance < 0.1 / tp_size:
        time.sleep(draw.random() * _LONGEST_STALL_S)
    elif chance < 0.2 / tp_size and device.type == "cuda":
        torch.cuda._sleep(draw.randrange(_LONGEST_STALL_CYCLES))  # type: ignore[no-untyped-call]


def _compare(tally: Tally, keys: Tensor, part: Part, rank: int, first_round: int) -> None:
    wrong = keys.cpu() != part.expected(rank)
    tally.keys += sum(part.counts)
    tally.wrong += int(wrong.sum())
    if tally.first_wrong_round is None and bool(wrong.any()):
        tally.first_wrong_round = first_round + int(wrong.any(dim=1).nonzero()[0])


if __name__ == "__main__":
    sys.exit(main())
