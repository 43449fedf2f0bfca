"""The batch sizes for which a scan of the shard beats retrieval, found by measurement.

Only this rank's compute is timed, since both ways take the same exchange. A batch takes as long as
the slowest rank's median, and every rank comes to the same answer. It is cached and reused for the
same index, probes, rows, ranks, device and threads, with the same kernels and torch. The first
rank's device stands for all; it alone reads the cache, so that all ranks of a group change over at
the same batch size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashhead_dist.bench.control import Control
from flashhead_dist.bench.records import Record
from flashhead_dist.bench.timer import (
    Step,
    compute_step,
    graphed_compute_step,
    step_clock,
)
from flashhead_dist.heads.base import Want
from flashhead_dist.heads.dense import DenseLocalMax
from flashhead_dist.heads.flashhead import FlashHead, FlashHeadAuto, scans_at
from flashhead_dist.measured_choices import measured_choices
from flashhead_kernels.timing import kernels_hash, time_steps
from flashhead_topology.probe import probe_machine

_ROUNDS = 7
_RESOLUTION = 32
"""A crossover is known to one part in this many. What retrieval takes grows with the batch at most
in proportion, so that this is also the share of a step that may be lost just beside it."""

MEASURED_NOW = "measured now"
MOST_LOST = 0.05
"""The share of the better head's compute that `flashhead_auto` may lose."""

_SCHEMA_VERSION = 2
"""Of a cached `Crossover`; another's is not found."""


@dataclass(frozen=True)
class Crossover:
    """changes_at: where `FlashHeadAuto` changes over, see there; empty where it always retrieves.

    times_us: by batch size, the slowest rank's (retrieval, scan). origin: `MEASURED_NOW`, or when
    it was cached. not_kept: why it could not be cached for other runs.
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
    time_steps(steps, 1)
    times = time_steps(steps, _ROUNDS)
    retrieve_us, scan_us = (float(np.median([us for us, _ in times[way]])) for way in steps)
    return retrieve_us, scan_us


def find_crossover_of(head: FlashHeadAuto, control: Control, *, largest: int) -> Crossover | None:
    """What another run measured, where it holds for batches of up to `largest` rows, else None.

    Every rank of the group calls it, and all get the same; nothing is set.

    Raises:
        UserError: on every rank, where the cache is damaged.
    """
    found: dict[str, Any] | None = None
    with control.phase():
        if control.is_first:
            found = measured_choices("crossover").find(_case(head))
    known = control.broadcast(found)
    if known is None:
        return None
    crossover = Crossover.from_json(known)
    return crossover if crossover.largest >= largest else None


def settle_crossover(
    head: FlashHeadAuto,
    batches: Callable[[int], Sequence[Tensor]],
    control: Control,
    *,
    largest: int,
    in_turn: bool,
    remeasure: bool = False,
) -> Crossover:
    """Tell `head` where to change over: what was kept, or what is measured now and kept.

    See `measure_crossover`; remeasure: whatever was kept.
    """
    crossover = None if remeasure else find_crossover_of(head, control, largest=largest)
    if crossover is None:
        crossover = measure_crossover(head, batches, control, largest=largest, in_turn=in_turn)
        not_kept: str | None = None
        if control.is_first:
            now = datetime.now(UTC).isoformat(timespec="seconds")
            not_kept = measured_choices("crossover").keep(
                _case(head), replace(crossover, origin=f"cached {now}").as_json()
            )
        crossover = replace(crossover, not_kept=control.broadcast(not_kept))
    head.changes_at = crossover.changes_at
    return crossover


def _case(head: FlashHeadAuto) -> dict[str, Any]:
    """All that a crossover depends on, as JSON values."""
    device: dict[str, Any]
    if head.tp.device.type == "cuda":
        device = {"device": torch.cuda.get_device_name(head.tp.device)}
    else:
        machine, threads = probe_machine(), torch.get_num_threads()
        cores = {"num_cores": machine.num_cores, "threads_per_rank": threads}
        device = {"device": machine.cpu_model, **cores}
    return {
        "schema_version": _SCHEMA_VERSION,
        "vocab_size": head.vocab_size,
        "hidden_size": head.hidden_size,
        "tp_size": head.tp.tp_size,
        "rows": str(head.shard.rows.dtype),
        "index_hash": head.index.manifest.index_hash,
        "num_probes": head.num_probes,
        "kernels": kernels_hash(),
        "torch": torch.__version__,
        **device,
    }


def crossover_notes(crossovers: Mapping[int, Crossover], records: Sequence[Record]) -> list[str]:
    """Sentences for the report; `crossovers` by tp_size."""
    sizes: dict[tuple[str, str], list[int]] = {}
    for tp_size, crossover in crossovers.items():
        sizes.setdefault((_where(crossover), crossover.origin), []).append(tp_size)
    notes = [
        f"flashhead_auto scans the whole shard {where} at tp {', '.join(map(str, tp_sizes))} "
        f"({origin})."
        for (where, origin), tp_sizes in sizes.items()
    ]
    reasons = {crossover.not_kept for crossover in crossovers.values()} - {None}
    notes += [f"Where flashhead_auto changes over was not cached: {reason}" for reason in reasons]
    return notes + _losses(crossovers, records)


def _where(crossover: Crossover) -> str:
    changes, largest = crossover.changes_at, crossover.largest
    if not changes:
        return f"at no batch size up to {largest}"
    starts, ends = changes[::2], (*changes[1::2], None)
    spans = [
        f"from batch {start} on" if end is None else f"from batch {start} to {end - 1}"
        for start, end in zip(starts, ends, strict=False)
    ]
    return f"{' and '.join(spans)} (of 1 to {largest})"


def _losses(crossovers: Mapping[int, Crossover], records: Sequence[Record]) -> list[str]:
    """How much longer it computes than the better of the two heads between which it chooses.

    Where it retrieves and `flashhead` is the better, both run the same code: what they differ by is
    the spread of the run, and no loss.
    """
    cells: dict[tuple[int, int], dict[str, float]] = {}
    for record in records:
        cells.setdefault((record.tp_size, record.batch_size), {})[record.head] = record.compute_us
    lost: list[tuple[float, tuple[int, int]]] = []
    spread: list[float] = []
    for place, us in cells.items():
        if not {FlashHeadAuto.name, FlashHead.name, DenseLocalMax.name} <= us.keys():
            continue
        retrieval_us, dense_us = us[FlashHead.name], us[DenseLocalMax.name]
        share = us[FlashHeadAuto.name] / min(retrieval_us, dense_us) - 1
        tp_size, batch_size = place
        changes_at = crossovers[tp_size].changes_at if tp_size in crossovers else ()
        if retrieval_us <= dense_us and not scans_at(changes_at, batch_size):
            spread.append(share)
        else:
            lost.append((share, place))
    notes: list[str] = []
    if lost:
        share, (tp_size, batch_size) = max(lost)
        verdict = "within" if share <= MOST_LOST else "BEYOND"
        notes.append(
            f"flashhead_auto computes at worst {100 * share:+.1f} % longer than the better of "
            f"flashhead and dense_local_max (tp {tp_size}, batch {batch_size}): {verdict} the "
            f"{100 * MOST_LOST:.0f} % that it may lose."
        )
    if spread:
        notes.append(
            "Where flashhead is the better and flashhead_auto retrieves too, both do the same "
            f"work: they differ by {100 * min(spread):+.1f} to {100 * max(spread):+.1f} % here."
        )
    return notes
