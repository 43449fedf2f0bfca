"""Ranks of a key exchange as processes that share memory, each running the kernel interpreted.

    exchange_ranks.py SCENARIO RANKS ROUNDS [BUFFERS]

Prints one JSON object: `wrong`, rounds with a wrong key, and `keys`, keys compared, summed over
the ranks; `hung`, ranks that had not ended in time; `failed`, ranks that ended otherwise. A script
with processes, as the interpreter patches triton.language in place and serves one thread at a time.
"""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.synchronize
import random
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from flashhead_kernels import triton_exchange
from flashhead_kernels.keys import EMPTY_KEY, merged_keys, num_words

CAPACITY = 8
TIME_LIMIT_S = 60.0
PAUSED_ROUND = 2
Event = multiprocessing.synchronize.Event
_fork = multiprocessing.get_context("fork")


def keys_of(round_: int, tp_size: int) -> Tensor:
    """The keys `[P, B]` of a round, known to every rank: ties, no candidate, both ends of int64."""
    draw = random.Random(round_)
    awkward = [EMPTY_KEY, EMPTY_KEY + 1, -1, 0, 1, 2**63 - 1]
    # Many keys where it matters, or own keys that are the greatest would hide what went wrong.
    batch = CAPACITY if round_ == PAUSED_ROUND else draw.randint(1, CAPACITY)
    return torch.tensor(
        [
            [draw.choice(awkward) if draw.random() < 0.4 else draw.getrandbits(64) - 2**63
             for _ in range(batch)]
            for _ in range(tp_size)
        ]
    )  # fmt: skip


class Rank:
    """One rank: its epoch, and the addresses of everyone's words."""

    def __init__(self, rank: int, shared: Tensor) -> None:
        self.rank, self.tp_size = rank, shared.shape[0]
        self.addresses = torch.tensor([words.data_ptr() for words in shared])
        self.epoch = torch.zeros(1, dtype=torch.int64)

    def is_right(self, round_: int) -> tuple[bool, int]:
        """Run a round; whether its keys are right, and how many there were."""
        rank_keys = keys_of(round_, self.tp_size)
        keys = rank_keys[self.rank].clone()
        # An output that already held the answer would hide a kernel that writes none.
        out = keys if round_ % 2 else torch.full_like(keys, 7)
        triton_exchange.exchange_keys(keys, out, self.addresses, self.epoch, self.rank, CAPACITY)
        right = torch.equal(out, merged_keys(rank_keys)) and int(self.epoch) == round_
        return right, keys.numel()


def before(name: str, action: Callable[[int], None]) -> None:
    """Have `action(epoch)` done before the kernel's piece `name`, in this process."""
    piece = getattr(triton_exchange, name)

    def wrapped(*arguments: Any) -> Any:
        epoch = next(a for a in arguments if isinstance(a, tl.tensor) and a.dtype == tl.int64
                     and a.shape == [])  # fmt: skip
        action(int(epoch.handle.data.item()))
        return piece(*arguments)

    setattr(triton_exchange, name, wrapped)


def after(name: str, action: Callable[[int], None]) -> None:
    """Have `action(epoch)` done after the kernel's piece `name`, in this process."""
    piece = getattr(triton_exchange, name)

    def wrapped(*arguments: Any) -> Any:
        result = piece(*arguments)
        epoch = next(a for a in arguments if isinstance(a, tl.tensor) and a.dtype == tl.int64
                     and a.shape == [])  # fmt: skip
        action(int(epoch.handle.data.item()))
        return result

    setattr(triton_exchange, name, wrapped)


def stall_at_random(rank: int, tp_size: int, _: Event) -> None:
    """Every rank now and then sleeps before a piece, another rank each time."""
    draw = random.Random(100 + rank)

    def stall(_: int) -> None:
        if draw.random() < 1 / (2 * tp_size):
            time.sleep(draw.random() * 0.02)

    for name in ("_send", "_signal", "_wait", "_collect"):
        before(name, stall)


def overtaken_before(name: str) -> Callable[[int, int, Event], None]:
    """Rank 1 stops before `name` in a round until rank 0 has signalled the next round."""

    def scenario(rank: int, _: int, overtaken: Event) -> None:
        if rank == 0:
            after("_signal", lambda e: overtaken.set() if e == PAUSED_ROUND + 1 else None)
        elif rank == 1:
            before(name, lambda e: _await(overtaken) if e == PAUSED_ROUND else None)

    return scenario


def unawaited(rank: int, _: int, passed: Event) -> None:
    """No rank waits for signals, and rank 0 sends only when rank 1 has read: a faulty kernel."""
    triton_exchange._wait = lambda *_: None
    if rank == 0:
        before("_send", lambda e: _await(passed) if e == PAUSED_ROUND else None)
    elif rank == 1:
        after("_collect", lambda e: passed.set() if e == PAUSED_ROUND else None)


def waits_for_one(rank: int, tp_size: int, passed: Event) -> None:
    """Ranks await all peers but the last, which sends late: a faulty kernel."""
    wait = triton_exchange._wait

    def too_few(addresses: Any, epoch: Any, own: Any, size: int, padded: int) -> None:
        wait(addresses, epoch, own, size - 1, padded)

    triton_exchange._wait = too_few
    if rank == tp_size - 1:
        before("_send", lambda e: _await(passed) if e == PAUSED_ROUND else None)
    elif rank == 0:
        after("_collect", lambda e: passed.set() if e == PAUSED_ROUND else None)


def _await(event: Event) -> None:
    if not event.wait(TIME_LIMIT_S / 2):
        raise TimeoutError("the schedule of this scenario cannot happen")


SCENARIOS: dict[str, Callable[[int, int, Event], None]] = {
    "stalls": stall_at_random,
    "overtaken_reader": overtaken_before("_collect"),
    "overtaken_waiter": overtaken_before("_wait"),
    "unawaited": unawaited,
    "waits_for_one": waits_for_one,
}


def run_rank(
    scenario: str, rank: int, shared: Tensor, totals: Tensor, event: Event, rounds: int
) -> None:
    """One process; leaves (wrong rounds, keys compared) in its row of `totals`."""
    SCENARIOS[scenario](rank, shared.shape[0], event)
    here = Rank(rank, shared)
    for round_ in range(1, rounds + 1):
        right, compared = here.is_right(round_)
        totals[rank] += torch.tensor([not right, compared])


def main(scenario: str, tp_size: int, rounds: int, num_buffers: int = 2) -> None:
    """Run the ranks and print what they found."""
    torch.set_num_threads(1)
    triton_exchange._BUFFERS = tl.constexpr(num_buffers)
    shared = torch.zeros(tp_size, num_words(tp_size, CAPACITY), dtype=torch.int64).share_memory_()
    totals = torch.zeros(tp_size, 2, dtype=torch.int64).share_memory_()
    event = _fork.Event()
    ranks = [
        _fork.Process(target=run_rank, args=(scenario, r, shared, totals, event, rounds))
        for r in range(tp_size)
    ]
    for process in ranks:
        process.start()
    deadline_s = time.monotonic() + TIME_LIMIT_S
    for process in ranks:
        process.join(max(0.0, deadline_s - time.monotonic()))
    hung = [r for r, process in enumerate(ranks) if process.is_alive()]
    for process in ranks:
        process.kill()
        process.join()
    failed = [r for r, process in enumerate(ranks) if r not in hung and process.exitcode != 0]
    wrong, compared = totals.sum(0).tolist()
    print(json.dumps({"wrong": wrong, "keys": compared, "hung": hung, "failed": failed}))


if __name__ == "__main__":
    main(sys.argv[1], *(int(text) for text in sys.argv[2:]))
