"""The ranks of a group against each other: who is slow, and how long the others wait for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from flashhead_dist.bench.records import Record
from flashhead_dist.bench.split import PARTS
from flashhead_dist.report.chart import Chart
from flashhead_dist.report.plot_frame import PROJECTED_GROUND
from flashhead_dist.report.runs import Run
from flashhead_dist.report.section import Plot, Section, frame_of
from flashhead_dist.report.sections.split import PART_COLORS
from flashhead_dist.report.verdict import PRODUCT

KEY = "ranks"
_TITLE = "Ranks against each other"
_SLOW_BY = 0.1


@dataclass(frozen=True)
class SlowRank:
    """`rank` computes longest for `num_heads` of the `of_heads` heads of a cell.

    excess_us: what it computes beyond the others' median, median over those heads. waiting_us: how
    long the rank waits that waits longest, likewise; None where not known.
    """

    tp_size: int
    batch_size: int
    rank: int
    num_heads: int
    of_heads: int
    excess_us: float
    waiting_us: float | None
    measured: bool


def ranks_section(run: Run) -> Section:
    """Each rank's parts of a step, for the product or the first head that exchanges."""
    records = [record for record in run.records if record.tp_size > 1]
    if not records:
        return Section(key=KEY, title=_TITLE, missing="one rank has no other to compare with")
    slow = slow_ranks(records)
    slow_at = {(found.batch_size, found.tp_size): found.rank for found in slow}
    notes = [_words(found) for found in slow] or [
        "No rank is slow: none computes 10 % longer than the others for most heads, and beyond "
        "their scatter for half."
    ]
    if any(not record.measured for record in records):
        notes.append("On grey: each rank alone; its waiting is PROJECTED from the others' compute.")
    head = PRODUCT if PRODUCT in run.heads else run.heads[0]
    notes.append(f"The plots show {head}; the figures are of all heads.")
    drawn = [record for record in records if record.head == head]
    return Section(
        key=KEY,
        title=_TITLE,
        notes=tuple(notes),
        frame=frame_of([row for record in records for row in _rows(record)]),
        plots=tuple(
            _plot(run, record, slow_at.get((record.batch_size, record.tp_size)))
            for record in sorted(drawn, key=lambda r: (r.batch_size, r.tp_size))
            if record.split.by_rank_us["other"]
        ),
        marks=tuple((f"color:{PART_COLORS[part]}", part) for part in PARTS),
    )


def slow_ranks(records: Sequence[Record]) -> list[SlowRank]:
    """The slow rank of each cell, where there is one.

    For half of the cell's heads or more its compute stands out from the others' scatter (the
    record's own `slow_rank`), and for most it is the longest, by 10 % or more.
    """
    found = []
    for batch_size, tp_size in sorted({(r.batch_size, r.tp_size) for r in records}):
        cell = [r for r in records if (r.batch_size, r.tp_size) == (batch_size, tp_size)]
        ranks = [r.split.slow_rank.rank for r in cell if r.split.slow_rank is not None]
        if not ranks:
            continue
        rank = max(sorted(set(ranks)), key=ranks.count)
        longest = [r for r in cell if excess_us(r, rank) >= _SLOW_BY * _others_us(r, rank)]
        if 2 * ranks.count(rank) < len(cell) or 2 * len(longest) <= len(cell):
            continue
        waits = [r.split.step_us["waiting"] for r in longest]
        known = [wait.median for wait in waits if wait is not None]
        found.append(
            SlowRank(
                tp_size=tp_size,
                batch_size=batch_size,
                rank=rank,
                num_heads=len(longest),
                of_heads=len(cell),
                excess_us=median(excess_us(r, rank) for r in longest),
                waiting_us=median(known) if known else None,
                measured=cell[0].measured,
            )
        )
    return found


def excess_us(record: Record, rank: int) -> float:
    """What a rank computes beyond the median of the others'; negative where another is longer."""
    mine = record.compute_us_by_rank[rank]
    return -1.0 if mine < max(record.compute_us_by_rank) else mine - _others_us(record, rank)


def _others_us(record: Record, rank: int) -> float:
    return median(us for other, us in enumerate(record.compute_us_by_rank) if other != rank)


def _words(slow: SlowRank) -> str:
    text = (
        f"Rank {slow.rank} is SLOW at tp {slow.tp_size}, batch {slow.batch_size}: for "
        f"{slow.num_heads} of {slow.of_heads} heads it computes longer than every other rank, by "
        f"{slow.excess_us:,.0f} µs (median over heads)"
    )
    if slow.waiting_us is None:
        return f"{text}."
    kind = "" if slow.measured else "PROJECTED to "
    verb = "wait" if kind else "waits"
    return f"{text}; the rank that waits longest {'is ' if kind else ''}{kind}{verb} " + (
        f"{slow.waiting_us:,.0f} µs a step for it."
    )


def _rows(record: Record) -> list[dict[str, object]]:
    waiting = record.split.by_rank_us["waiting"]
    kind = "measured" if record.measured else "projected"
    middle = median(record.compute_us_by_rank)
    return [
        {
            "batch_size": record.batch_size,
            "tp_size": record.tp_size,
            "head": record.head,
            "rank": rank,
            "compute_us": compute_us,
            "over_median_rank": compute_us / middle,
            f"{kind}_waiting_us": None if waiting is None else waiting[rank].median,
        }
        for rank, compute_us in enumerate(record.compute_us_by_rank)
    ]


def _plot(run: Run, record: Record, slow: int | None) -> Plot:
    words = f"{record.head} by rank, tp {record.tp_size}, batch {record.batch_size}"
    key = f"{KEY}-{run.letter}-tp{record.tp_size}-b{record.batch_size}"
    chart = Chart(key, words)
    if not record.measured:
        chart.axes.set_facecolor(PROJECTED_GROUND)
    tops = []
    for rank in range(record.tp_size):
        bottom = 0.0
        for part in PARTS:
            found = record.split.by_rank_us[part]
            if found is None or not found[rank].median:
                continue
            us = found[rank].median
            bar = chart.axes.bar(rank, us, 0.7, bottom, color=PART_COLORS[part], linewidth=0)
            projected = part == "waiting" and not record.measured
            kind = " (PROJECTED)" if projected else ""
            chart.mark(list(bar), f"rank {rank}: {part} {us:,.0f} µs{kind}")
            bottom += us
        tops.append(bottom)
    if slow is not None:
        chart.axes.annotate("slow", (slow, tops[slow]), ha="center", va="bottom", color="#B91C1C")
    chart.axes.set_ylim(0, 1.12 * max(tops))
    chart.axes.set_xticks(range(record.tp_size))
    chart.axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    chart.axes.set_xlabel("rank")
    chart.axes.set_ylabel("µs of a step")
    return chart.plot(f"batch {record.batch_size}")
