"""Sections of the page on the time of a step: latency, parts, scaling, ranks, crossover, pipeline.

Each is a function of a run that returns a `Section`: a frame, which is also a CSV file, and charts
of that frame. Batch sizes or `tp_size` are the columns of a section's grid of charts.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from functools import partial
from statistics import median
from typing import Any

import pandas as pd

from flashhead_dist.bench.crossover import Crossover, crossover_notes
from flashhead_dist.bench.records import ENVIRONMENT_NAME, PIPELINE_NAME, Record
from flashhead_dist.bench.split import COMPUTE_PARTS, PARTS
from flashhead_dist.errors import UserError
from flashhead_dist.heads.flashhead import FlashHeadAuto
from flashhead_dist.heads.registry import BASELINE, DEFAULT_HEAD
from flashhead_dist.report.figures import (
    GREY,
    PART_COLORS,
    PROJECTED_GREY,
    Chart,
    Section,
    draw_ideal,
    head_chart,
    head_legend,
    line,
    log_numbers,
    size_axis,
    style_of,
)
from flashhead_dist.report.runs import RunFolder, table_frame

_PATH = (*COMPUTE_PARTS, "exchange")
_SLOW_BY = 0.1
_SCHEDULE_COLORS = {"continuous": "#0072B2", "flushed": "#D55E00"}


def latency_chart(run: RunFolder, batch_size: int, key: str, cell: tuple[int, int] = (1, 1)) -> str:
    """Latency of all heads against `tp_size`, with p10 to p90 and the ideal of the dense head."""
    batch = run.frame[run.frame["batch_size"] == batch_size]
    batch = batch.assign(low=batch["p10_us"], high=batch["p90_us"])
    title = f"Latency, batch {batch_size}"
    chart = head_chart(key, title, batch, "median_us", "{:,.0f} µs", run.heads, cell)
    draw_ideal(chart.axes, batch, BASELINE)
    log_numbers(chart.axes)
    # One scale for all batch sizes, with room for the word above what is projected.
    known = run.frame[["median_us", "p10_us", "p90_us"]]
    chart.axes.set_ylim(0.7 * known.min().min(), 1.7 * known.max().max())
    chart.axes.set_ylabel("µs a step")
    return chart.html()


def by_batch(run: RunFolder, draw: Callable[[int, tuple[int, int]], str]) -> tuple[list[str], int]:
    """A chart a batch size, side by side, and their number; draw: of a batch size and its cell."""
    sizes = run.batch_sizes
    return [draw(size, (place, len(sizes))) for place, size in enumerate(sizes, 1)], len(sizes)


def latency_section(run: RunFolder) -> Section:
    """A chart a batch size; measured and projected latencies in columns of their own."""
    projected = not run.frame["measured"].all()
    notes = ["A step lasts as long as its slowest rank. Bars: p10 to p90 over iterations."]
    if projected:
        notes.append(
            "PROJECTED (hollow, on grey): isolated compute of the slowest rank plus a model of the "
            "exchange, because the ranks share cores."
        )
    if run.frame["median_us"].isna().any():
        notes.append("Sizes whose communication is unknown are left out of the charts.")
    wall_us = run.frame["wall_median_us"].where(~run.frame["measured"])
    legend = [*head_legend(run.heads), ("o-", "measured")]
    legend += [("hollow--", "PROJECTED")] if projected else []
    legend += [(":", f"ideal: {BASELINE} at tp 1, over tp")]
    frame = table_frame(run.frame.assign(wall_median_us=wall_us), "latency")
    charts, columns = by_batch(
        run, lambda size, cell: latency_chart(run, size, f"latency-{run.letter}-b{size}", cell)
    )
    return Section("latency", "Latency of a step", notes, frame, charts, columns, legend)


def split_section(run: RunFolder) -> Section:
    """Shares of a step along the rank that computes longest, a chart a batch size and `tp_size`."""
    methods = dict.fromkeys(record.split.method for record in run.records)
    names = {
        "centroids": "centroid scores and choice of clusters",
        "candidates": "rows scored exactly",
        "other": "other compute",
        "exchange": "exchange without waiting",
        "waiting": "longest wait of another rank",
    }
    notes = [
        "Parts of the step of the rank that computes longest. The thin bar is the longest wait of "
        "another rank. On grey the exchange is not measured, because ranks share cores.",
        *(f"Method: {method}." for method in methods),
    ]
    charts = [_split_chart(run, cell) for _, cell in run.frame.groupby(["batch_size", "tp_size"])]
    legend = [(PART_COLORS[part], text) for part, text in names.items()]
    frame = table_frame(run.frame, "split")
    return Section("split", "Parts of a step", notes, frame, charts, len(run.tp_sizes), legend)


def _split_chart(run: RunFolder, cell: pd.DataFrame) -> str:
    first = cell.iloc[0]
    batch_size, tp_size = first["batch_size"], first["tp_size"]
    place = run.tp_sizes.index(int(tp_size)) + 1
    chart = Chart(
        f"split-{run.letter}-b{batch_size}-tp{tp_size}", f"tp {tp_size}, batch {batch_size}",
        (place, len(run.tp_sizes)), height_px=62 + 25 * len(cell),
    )  # fmt: skip
    axes = chart.axes
    if not first["measured"]:
        axes.set_facecolor(PROJECTED_GREY)
    parts = [f"{part}_us" for part in _PATH]
    for y, row in enumerate(cell.fillna(dict.fromkeys(parts, 0.0)).to_dict("records")):
        total, left = sum(row[part] for part in parts), 0.0
        for part in _PATH:
            us = row[f"{part}_us"]
            if us and total:
                (bar,) = axes.barh(y, us / total, 0.5, left, color=PART_COLORS[part], linewidth=0)
                chart.mark(bar, f"{row['head']}: {part} {us:,.0f} µs, {100 * us / total:.0f} %")
                left += us / total
        waiting = row["waiting_us"]
        if waiting and total:
            kind = "" if row["measured"] else " (PROJECTED)"
            width = min(waiting / total, 1.0)
            (bar,) = axes.barh(y + 0.36, width, 0.16, color=PART_COLORS["waiting"], linewidth=0)
            chart.mark(bar, f"{row['head']}: another rank waits {waiting:,.0f} µs{kind}")
        axes.text(1.04, y, f"{total:,.0f} µs", va="center", fontsize=7.2)
    axes.set_yticks(range(len(cell)), cell["head"], fontsize=7.2)
    axes.set_ylim(len(cell) - 0.4, -0.5)
    axes.set_xlim(0, 1.4)
    axes.set_xticks([0, 0.5, 1.0], ["0", "50 %", "100 %"])
    axes.grid(visible=False, axis="y")
    return chart.html()


def scaling_section(run: RunFolder) -> Section:
    """Speedup t(1) / t(P) and efficiency t(1) / (P t(P)), with the ideal lines P and 1."""
    title = "Strong scaling"
    frame, sizes = run.frame, run.tp_sizes
    known = frame[frame["speedup"].notna()]
    if len(sizes) < 2:
        missing = f"one tp_size was measured ({sizes[0]}): scaling needs two or more"
        return Section("scaling", title, missing=missing)
    if known.empty:
        missing = "nothing was measured at tp 1, which speedups refer to"
        return Section("scaling", title, missing=missing)
    notes = ["Each head against its own step at tp 1. Bars: p10 to p90. On grey: PROJECTED."]
    charts: list[str] = []
    for y in ("speedup", "scaling_efficiency"):
        row, columns = by_batch(run, partial(_scaling_chart, run, known, y))
        charts += row
    legend = [*head_legend(run.heads), (":", "ideal")]
    return Section("scaling", title, notes, table_frame(known, "scaling"), charts, columns, legend)


def _scaling_chart(
    run: RunFolder, frame: pd.DataFrame, y: str, batch_size: int, cell: tuple[int, int]
) -> str:
    batch = frame[frame["batch_size"] == batch_size]
    is_speedup = y == "speedup"
    divisor = 1 if is_speedup else batch["tp_size"]
    # At tp 1 a speedup is 1 by definition.
    ends = batch[["speedup_p10", "speedup_p90"]].where(batch["tp_size"] > 1)
    batch = batch.assign(
        scaling_efficiency=batch["speedup"] / batch["tp_size"],
        low=ends["speedup_p10"] / divisor,
        high=ends["speedup_p90"] / divisor,
    )
    key, name, text = (
        ("speedup", "Speedup over tp 1", "{:.2f} times tp 1")
        if is_speedup
        else ("efficiency", "Efficiency", "{:.0%}")
    )
    key, title = f"{key}-{run.letter}-b{batch_size}", f"{name}, batch {batch_size}"
    chart = head_chart(key, title, batch, y, text, run.heads, cell)
    sizes = sorted(batch["tp_size"].unique())
    ideal = sizes if is_speedup else [1.0] * len(sizes)
    chart.axes.plot(sizes, ideal, color=GREY, linestyle=":", linewidth=1.2, zorder=1)
    if is_speedup:
        chart.axes.set_yscale("log", base=2)
        chart.axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}×")
        chart.axes.yaxis.minorticks_off()
        chart.axes.set_ylim(0.7 * frame["speedup"].min(), 1.4 * max(run.tp_sizes))
    else:
        efficiency = frame["speedup"] / frame["tp_size"]
        chart.axes.set_ylim(0, 1.15 * max(1.0, efficiency.max()))
        chart.axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    return chart.html()


def ranks_section(run: RunFolder) -> Section:
    """Compute and waiting of each rank, and which rank is slow."""
    title = "Ranks"
    records = [record for record in run.records if record.tp_size > 1]
    if not records:
        return Section("ranks", title, missing="one rank has no other to compare with")
    slow = slow_ranks(records)
    slow_at = {(row["batch_size"], row["tp_size"]): row["rank"] for row in slow.to_dict("records")}
    notes = [_slow_note(row) for row in slow.to_dict("records")] or [
        "No rank is slow: none computes 10 % longer than the others for most heads, and beyond "
        "their scatter for half."
    ]
    head = DEFAULT_HEAD if DEFAULT_HEAD in run.heads else run.heads[0]
    notes.append(f"The charts show {head}. On grey: isolated compute; waiting is PROJECTED.")
    rows = [row for record in records for row in _rank_rows(record)]
    frame = pd.DataFrame(rows).dropna(axis="columns", how="all")
    drawn = [r for r in records if r.head == head and r.split.by_rank_us["other"]]
    drawn.sort(key=lambda r: (r.batch_size, r.tp_size))
    charts = [_ranks_chart(run, r, slow_at.get((r.batch_size, r.tp_size))) for r in drawn]
    legend = [(PART_COLORS[part], part) for part in PARTS]
    columns = sum(size > 1 for size in run.tp_sizes)
    return Section("ranks", title, notes, frame, charts, columns, legend)


def slow_ranks(records: list[Record]) -> pd.DataFrame:
    """The slow rank of each cell that has one: a row with its excess and the others' waiting.

    For half of the cell's heads or more its compute exceeds the others' scatter (the record's own
    `slow_rank`), and for most it is the longest, by 10 % of the others' median or more.
    """
    found = []
    for batch_size, tp_size in sorted({(r.batch_size, r.tp_size) for r in records}):
        cell = [r for r in records if (r.batch_size, r.tp_size) == (batch_size, tp_size)]
        ranks = [r.split.slow_rank.rank for r in cell if r.split.slow_rank is not None]
        if not ranks:
            continue
        rank = max(sorted(set(ranks)), key=ranks.count)
        excess = {r.head: excess_us(r, rank) for r in cell}
        slow = [r for r in cell if excess[r.head] >= _SLOW_BY * _others_us(r, rank)]
        if 2 * ranks.count(rank) < len(cell) or 2 * len(slow) <= len(cell):
            continue
        waits = [us.median for r in slow if (us := r.split.step_us["waiting"]) is not None]
        found.append(
            {
                "batch_size": batch_size,
                "tp_size": tp_size,
                "rank": rank,
                "num_heads": len(slow),
                "of_heads": len(cell),
                "excess_us": median(excess[r.head] for r in slow),
                "waiting_us": median(waits) if waits else None,
                "measured": cell[0].measured,
            }
        )
    return pd.DataFrame(found)


def excess_us(record: Record, rank: int) -> float:
    """What a rank computes beyond the median of the others; -1 where another computes longer."""
    own_us = record.compute_us_by_rank[rank]
    return -1.0 if own_us < max(record.compute_us_by_rank) else own_us - _others_us(record, rank)


def _others_us(record: Record, rank: int) -> float:
    return median(us for other, us in enumerate(record.compute_us_by_rank) if other != rank)


def _slow_note(row: Mapping[Hashable, Any]) -> str:
    text = (
        f"Rank {row['rank']} is SLOW at tp {row['tp_size']}, batch {row['batch_size']}: for "
        f"{row['num_heads']} of {row['of_heads']} heads it computes longer than every other rank, "
        f"by {row['excess_us']:,.0f} µs (median over heads)"
    )
    if pd.isna(row["waiting_us"]):
        return f"{text}."
    kind = "" if row["measured"] else " (PROJECTED)"
    return f"{text}. Another rank waits up to {row['waiting_us']:,.0f} µs a step for it{kind}."


def _rank_rows(record: Record) -> list[dict[str, object]]:
    waiting = record.split.by_rank_us["waiting"]
    middle = median(record.compute_us_by_rank)
    row = {key: getattr(record, key) for key in ("batch_size", "tp_size", "head")}
    kind = "measured" if record.measured else "projected"
    return [
        row
        | {"rank": rank, "compute_us": compute_us, "over_median_rank": compute_us / middle}
        | {"measured_waiting_us": None, "projected_waiting_us": None}
        | {f"{kind}_waiting_us": None if waiting is None else waiting[rank].median}
        for rank, compute_us in enumerate(record.compute_us_by_rank)
    ]


def _ranks_chart(run: RunFolder, record: Record, slow: int | None) -> str:
    sizes = [size for size in run.tp_sizes if size > 1]
    chart = Chart(
        f"ranks-{run.letter}-tp{record.tp_size}-b{record.batch_size}",
        f"{record.head}, tp {record.tp_size}, batch {record.batch_size}",
        (sizes.index(record.tp_size) + 1, len(sizes)), height_px=200,
    )  # fmt: skip
    if not record.measured:
        chart.axes.set_facecolor(PROJECTED_GREY)
    tops = [0.0] * record.tp_size
    for part in PARTS:
        for rank, found in enumerate(record.split.by_rank_us[part] or []):
            if not found.median:
                continue
            (bar,) = chart.axes.bar(
                rank, found.median, 0.7, tops[rank], color=PART_COLORS[part], linewidth=0
            )
            kind = " (PROJECTED)" if part == "waiting" and not record.measured else ""
            chart.mark(bar, f"rank {rank}: {part} {found.median:,.0f} µs{kind}")
            tops[rank] += found.median
    if slow is not None:
        chart.axes.annotate("slow", (slow, tops[slow]), ha="center", va="bottom", color="#B91C1C")
    chart.axes.set_ylim(0, 1.12 * max(tops))
    chart.axes.set_xticks(range(record.tp_size))
    chart.axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    chart.axes.set_xlabel("rank")
    chart.axes.set_ylabel("µs of a step")
    return chart.html()


def crossover_section(run: RunFolder) -> Section:
    """Retrieval against a scan of the index's rows by batch size, a chart a `tp_size`.

    Raises:
        UserError: `environment.json` holds crossovers that cannot be read.
    """
    title = "Batch crossover"
    if not run.environment:
        return Section("crossover", title, missing=f"the run has no {ENVIRONMENT_NAME}")
    found: Mapping[str, Any] = run.environment.get("crossovers") or {}
    try:
        crossovers = {int(size): Crossover.from_json(value) for size, value in found.items()}
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(
            f"{run.folder / ENVIRONMENT_NAME} is damaged at crossovers ({error!r}): restore or "
            f"remove it"
        ) from error
    if not crossovers:
        missing = "flashhead_auto, which searches for it, was not measured"
        if FlashHeadAuto.name in run.environment.get("heads", []):
            missing = "the run ended before it wrote its crossovers"
        return Section("crossover", title, missing=missing)
    sizes = sorted(crossovers)
    frame = pd.DataFrame(
        [
            {"tp_size": tp, "batch_size": batch, "retrieval_us": times[0], "scan_us": times[1]}
            for tp in sizes
            for batch, times in sorted(crossovers[tp].times_us.items())
        ]
    )
    frame["scan_over_retrieval"] = frame["scan_us"] / frame["retrieval_us"]
    notes = [
        "Compute of the slowest rank, median of 7 rounds. On grey a scan takes less time.",
        *crossover_notes({size: crossovers[size] for size in sizes}, run.records),
    ]
    charts = [
        _crossover_chart(run, frame[frame["tp_size"] == tp], crossovers[tp], (place, len(sizes)))
        for place, tp in enumerate(sizes, start=1)
    ]
    legend = [(DEFAULT_HEAD, "retrieval"), (BASELINE, "scan of the rank's rows")]
    return Section("crossover", title, notes, frame, charts, len(sizes), legend)


def _crossover_chart(
    run: RunFolder, frame: pd.DataFrame, crossover: Crossover, cell: tuple[int, int]
) -> str:
    tp_size = frame["tp_size"].iloc[0]
    key, title = f"crossover-{run.letter}-tp{tp_size}", f"Retrieval or scan, tp {tp_size}"
    chart = Chart(key, title, cell, height_px=220)
    sizes = frame["batch_size"].tolist()
    for name, head in (("retrieval", DEFAULT_HEAD), ("scan", BASELINE)):
        text = name + ", batch {}: {:,.0f} µs"
        line(chart, frame["batch_size"], frame[f"{name}_us"], text, **style_of(head))
    changes = crossover.changes_at
    for start, end in zip(changes[::2], (*changes[1::2], sizes[-1] * 2**0.4), strict=False):
        chart.axes.axvspan(start, end, color=PROJECTED_GREY, zorder=0)
    log_numbers(chart.axes)
    size_axis(chart.axes, [size for size in sizes if size & (size - 1) == 0 or size == sizes[-1]])
    chart.axes.set_xlabel("batch size (rows)")
    chart.axes.set_ylabel("µs of compute")
    return chart.html()


def pipeline_section(run: RunFolder) -> Section:
    """Idle share of pipeline stages by micro-batches in flight and schedule.

    Raises:
        UserError: `pipeline.json` is not what launch/bench_pipeline.py writes.
    """
    title, document = "Pipeline bubble", run.pipeline
    if document is None:
        missing = f"the run has no {PIPELINE_NAME}: launch/bench_pipeline.py --run-dir writes it"
        return Section("pipeline", title, missing=missing)
    keys = ["micro_batches", "schedule", "tokens_per_s"]
    keys += ["measured_bubble", "formula_bubble", "ideal_bubble"]
    try:
        frame = pd.DataFrame([{key: row[key] for key in keys} for row in document["results"]])
        note, chart = _pipeline_note(document), _pipeline_chart(run, frame)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(
            f"{run.folder / PIPELINE_NAME} is damaged ({error!r}): write it again with "
            f"launch/bench_pipeline.py --run-dir, or remove it"
        ) from error
    notes = [
        note,
        "Bubble: mean share of time that a stage is idle. Formula: equal stages, flushed every "
        "step (GPipe, section 2.3). Free messages: the stages' measured compute, replayed.",
    ]
    legend = [(color, schedule) for schedule, color in _SCHEDULE_COLORS.items()]
    legend += [("o", "measured"), (":", "equal stages, by formula")]
    legend += [("--", "these stages, free messages")]
    return Section("pipeline", title, notes, frame, [chart], 1, legend)


def _pipeline_note(document: Mapping[str, Any]) -> str:
    stages = f"{document['pp_size']} stages"
    if document.get("sleep_ms") not in (None, "None"):
        return f"SIMULATED COMPUTE: {stages} that sleep; schedule and messages are real."
    model = document.get("model")
    shared = " OVERSUBSCRIBED: the stages shared cores." if document.get("oversubscribed") else ""
    return (
        f"{stages} of {'the default model' if model in (None, 'None') else model} with the head "
        f"{document['head']}, {document['new_tokens']} tokens a sequence, median of "
        f"{document['repeats']} runs.{shared}"
    )


def _pipeline_chart(run: RunFolder, frame: pd.DataFrame) -> str:
    chart = Chart(f"pipeline-{run.letter}", "Idle share of the stages")
    for schedule, own in frame.groupby("schedule", sort=False):
        own = own.sort_values("micro_batches")
        color = _SCHEDULE_COLORS.get(str(schedule), "#374151")
        numbers = own["micro_batches"]
        for key, dashes in (("formula", ":"), ("ideal", "--")):
            chart.axes.plot(numbers, 100 * own[f"{key}_bubble"], dashes, color=color, linewidth=1.1)
        text = f"{schedule}, {{}} micro-batches: idle {{:.1f}} %"
        line(chart, numbers, 100 * own["measured_bubble"], text, marker="o", color=color)
    size_axis(chart.axes, sorted(frame["micro_batches"].unique()))
    chart.axes.set_ylim(bottom=0)
    chart.axes.set_xlabel("micro-batches in flight")
    chart.axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0f} %")
    return chart.html()


STEP_SECTIONS = (
    latency_section, split_section, scaling_section, ranks_section, crossover_section,
    pipeline_section,
)  # fmt: skip
