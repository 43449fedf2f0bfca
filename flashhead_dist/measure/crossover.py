"""The batch size from which a scan of the shard beats retrieval, found by measurement.

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

from flashhead_dist.heads.base import Want
from flashhead_dist.heads.flashhead_auto import FlashHeadAuto
from flashhead_dist.measure.control import Control
from flashhead_dist.measure.records import Record
from flashhead_dist.measure.timing import cache_flusher, compute_step, time_interleaved

_ROUNDS = 7
_RESOLUTION = 8
"""The crossover is known to one part in this many."""


MEASURED_NOW = "measured now"
MOST_LOST = 0.05
"""The share of the better head's compute that `flashhead_auto` may lose."""


@dataclass(frozen=True)
class Crossover:
    """scan_from: smallest batch size known to be faster scanned, None where none was.

    times_us: by batch size, the slowest rank's (retrieval, scan). origin: `MEASURED_NOW`, or since
    when it was kept. not_kept: why it could not be kept for other runs.
    """

    scan_from: int | None
    times_us: Mapping[int, tuple[float, float]]
    origin: str = MEASURED_NOW
    not_kept: str | None = None

    def holds_up_to(self, largest: int) -> bool:
        """Whether it answers for all batches of up to `largest` rows."""
        return self.scan_from is not None or largest <= max(self.times_us)

    def as_json(self) -> dict[str, Any]:
        """The form that `environment.json` and the cache hold."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Crossover:
        """Read what `as_json` wrote, after JSON has made texts of the batch sizes."""
        times = {int(size): (us[0], us[1]) for size, us in value["times_us"].items()}
        return cls(value["scan_from"], times, value["origin"], value["not_kept"])


def find_crossover(faster: Callable[[int], bool], largest: int) -> int | None:
    """The smallest batch size up to `largest` for which `faster`, to one part in eight, or None.

    Doubles until it is so, then halves the bracket: it takes `faster` to be false, then true.
    """
    low, high = 0, 1
    while not faster(high):
        if high == largest:
            return None
        low, high = high, min(2 * high, largest)
    while high - low > max(1, high // _RESOLUTION):
        middle = (low + high) // 2
        low, high = (low, middle) if faster(middle) else (middle, high)
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

    return Crossover(find_crossover(faster, largest), times_us)


def crossover_notes(crossovers: Mapping[int, Crossover], records: Sequence[Record]) -> list[str]:
    """Sentences for the report: where `flashhead_auto` changes over, and what it lost by it."""
    sizes: dict[tuple[str, str], list[int]] = {}
    for tp_size, crossover in crossovers.items():
        where = f"from batch {crossover.scan_from} on"
        if crossover.scan_from is None:
            where = f"at no batch size up to {max(crossover.times_us)}"
        sizes.setdefault((where, crossover.origin), []).append(tp_size)
    notes = [
        f"flashhead_auto scans the whole shard {where} at tp {', '.join(map(str, tp_sizes))} "
        f"({origin})."
        for (where, origin), tp_sizes in sizes.items()
    ]
    reasons = {crossover.not_kept for crossover in crossovers.values()} - {None}
    notes += [f"Where flashhead_auto changes over was not kept: {reason}" for reason in reasons]
    cells: dict[tuple[int, int], dict[str, float]] = {}
    for record in records:
        cells.setdefault((record.tp_size, record.batch_size), {})[record.head] = record.compute_us
    lost = [
        (cell[FlashHeadAuto.name] / min(cell["flashhead"], cell["dense_local_max"]) - 1, place)
        for place, cell in cells.items()
        if {FlashHeadAuto.name, "flashhead", "dense_local_max"} <= cell.keys()
    ]
    if lost:
        share, (tp_size, batch_size) = max(lost)
        verdict = "within" if share <= MOST_LOST else "BEYOND"
        notes.append(
            f"flashhead_auto computes at worst {100 * share:+.1f} % longer than the better of "
            f"flashhead and dense_local_max (tp {tp_size}, batch {batch_size}): "
            f"{verdict} the {100 * MOST_LOST:.0f} % that it may lose."
        )
    return notes


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
    steps = {
        "retrieve": compute_step(partial(head.retrieve, want=Want()), batches),
        "scan": compute_step(partial(head.scan, want=Want()), batches),
    }
    # What retrieval reads may fit a GPU's cache, what a scan reads does not.
    flush = cache_flusher(head.tp.device)
    time_interleaved(steps, 1, meet=lambda: None, before_step=flush)
    times = time_interleaved(steps, _ROUNDS, meet=lambda: None, before_step=flush)
    return (
        float(np.median(times["retrieve"].wall_us)),
        float(np.median(times["scan"].wall_us)),
    )
