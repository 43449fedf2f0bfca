"""The batch sizes for which a scan of the shard beats retrieval, found by measurement.

Only this rank's compute is timed, since both ways take the same exchange. A batch takes as long as
the slowest rank's median, and every rank comes to the same answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from flashhead_dist.bench.control import Control
from flashhead_dist.bench.graph import graphed_compute_step
from flashhead_dist.bench.timing import Step, compute_step, step_clock, time_interleaved
from flashhead_dist.heads.base import Want
from flashhead_dist.heads.flashhead_auto import FlashHeadAuto

_ROUNDS = 7
_RESOLUTION = 32
"""A crossover is known to one part in this many. What retrieval takes grows with the batch at most
in proportion, so that this is also the share of a step that may be lost just beside it."""

MEASURED_NOW = "measured now"


@dataclass(frozen=True)
class Crossover:
    """changes_at: where `FlashHeadAuto` changes over, see there; empty where it always retrieves.

    times_us: by batch size, the slowest rank's (retrieval, scan). origin: `MEASURED_NOW`, or since
    when it was kept. not_kept: why it could not be kept for other runs.
    """

    changes_at: tuple[int, ...]
    times_us: Mapping[int, tuple[float, float]]
    origin: str = MEASURED_NOW
    not_kept: str | None = None

    @property
    def largest(self) -> int:
        """The largest batch size that was measured: beyond, it is a guess."""
        return max(self.times_us)

    def as_json(self) -> dict[str, Any]:
        """The form that `environment.json` and the cache hold."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Crossover:
        """Read what `as_json` wrote, after JSON has made texts of the batch sizes."""
        times = {int(size): (us[0], us[1]) for size, us in value["times_us"].items()}
        return cls(tuple(value["changes_at"]), times, value["origin"], value["not_kept"])


def find_changes(faster: Callable[[int], bool], largest: int) -> tuple[int, ...]:
    """Batch sizes up to `largest` at which `faster` turns true, false, true ..., ascending.

    It asks for the powers of two and `largest`, and halves the brackets whose ends differ until a
    turn is known to one part in 32; one that turns twice within a bracket goes unseen.
    """
    changes: list[int] = []
    low, before = 0, False
    for size in (*(2**i for i in range(largest.bit_length()) if 2**i < largest), largest):
        now = faster(size)
        if now is not before:
            changes.append(_turn(faster, low, size, now))
        low, before = size, now
    return tuple(changes)


def _turn(faster: Callable[[int], bool], low: int, high: int, after: bool) -> int:
    """A batch size at which `faster` is `after`, as it is at `high` and is not at `low`."""
    while high - low > max(1, high // _RESOLUTION):
        middle = (low + high) // 2
        low, high = (low, middle) if faster(middle) is after else (middle, high)
    return high


def measure_crossover(
    head: FlashHeadAuto,
    batches: Callable[[int], Sequence[Tensor]],
    control: Control,
    *,
    largest: int,
    in_turn: bool,
) -> Crossover:
    """Measure up to batches of `largest` rows; every rank of the group calls it.

    batches: hidden states `[B, D]` for a batch size. in_turn: one rank at a time, for ranks that
    share cores.
    """
    times_us: dict[int, tuple[float, float]] = {}

    def faster(batch_size: int) -> bool:
        mine = (0.0, 0.0)
        for _ in _turns(control, in_turn):
            mine = _medians_us(head, batches(batch_size))
        every = control.gather(mine)
        retrieval_us, scan_us = (max(rank[way] for rank in every) for way in (0, 1))
        times_us[batch_size] = (retrieval_us, scan_us)
        return bool(scan_us < retrieval_us)

    return Crossover(find_changes(faster, largest), times_us)


def _turns(control: Control, in_turn: bool) -> Iterator[None]:
    """Yields once: at once, or when the ranks before this one are done."""
    if not in_turn:
        control.barrier()
        yield
        return
    for turn in control.ranks:
        control.barrier()
        if turn == control.rank:
            yield
    control.barrier()


def _medians_us(head: FlashHeadAuto, batches: Sequence[Tensor]) -> tuple[float, float]:
    # A graph's replay on CUDA: launched from Python, either way takes as long as its launches do.
    as_step = graphed_compute_step if head.tp.device.type == "cuda" else compute_step
    clock = step_clock(head.tp.device)
    steps: dict[str, Step] = {
        "retrieve": as_step(partial(head.retrieve, want=Want()), batches, clock),
        "scan": as_step(partial(head.scan, want=Want()), batches, clock),
    }
    time_interleaved(steps, 1)
    times = time_interleaved(steps, _ROUNDS)
    return (
        float(np.median(times["retrieve"].wall_us)),
        float(np.median(times["scan"].wall_us)),
    )
