"""Rounds of a key exchange, one rank's side: keys that every rank can tell, and each is checked.

Knows an exchange by `all_reduce_max(keys)` alone, which changes its int64 keys in place.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from flashhead_kernels.exchange_layout import merged_keys
from flashhead_kernels.keys import EMPTY_KEY

ROUNDS_A_CHECK = 100
_LONGEST_STALL_S = 2e-3
_LONGEST_STALL_CYCLES = 2_000_000


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
