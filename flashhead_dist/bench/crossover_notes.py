"""What a report says of `flashhead_auto`: where it changes over, and what it lost by that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flashhead_dist.bench.crossover import Crossover
from flashhead_dist.bench.records import Record
from flashhead_dist.heads.dense import DenseLocalMax
from flashhead_dist.heads.flashhead import FlashHead
from flashhead_dist.heads.flashhead_auto import FlashHeadAuto, scans_at

MOST_LOST = 0.05
"""The share of the better head's compute that `flashhead_auto` may lose."""

_Place = tuple[int, int]
"""tp_size and batch size."""


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
    notes += [f"Where flashhead_auto changes over was not kept: {reason}" for reason in reasons]
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
    cells: dict[_Place, dict[str, float]] = {}
    for record in records:
        cells.setdefault((record.tp_size, record.batch_size), {})[record.head] = record.compute_us
    lost: list[tuple[float, _Place]] = []
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
