"""Tables, verdicts and files of what `bench.py` measured. A frame holds one row a `Measurement`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from rich.table import Table

from bench_ways import (
    DENSE_FUSED,
    DENSE_TORCH,
    FLASHHEAD,
    PUBLISHED_EAGER,
    PUBLISHED_GRAPH,
    TWO_LAUNCHES,
)

TARGET_DEVICE = "H200"
_FLOOR_FACTOR, _FLOOR_US = 1.5, 4.0
_TARGET_RATIOS = {
    DENSE_TORCH: (5.0, "torch's dense matmul + max"),
    PUBLISHED_EAGER: (3.0, "the eager torch FlashHead"),
}
_OTHER_WAYS = {
    DENSE_FUSED: "dense fused",
    DENSE_TORCH: "dense torch",
    PUBLISHED_EAGER: "published eager",
    PUBLISHED_GRAPH: "published graph",
    TWO_LAUNCHES: "two launches",
}
CSV_NAME, MARKDOWN_NAME, ENVIRONMENT_NAME = "kernels.csv", "kernels.md", "environment.json"
WHAT_IS_MEASURED = (
    "Weights and hidden states are SYNTHETIC: random values. At batch 1 the time does not depend "
    "on them; above, it depends on how many probes the rows share, and random rows share few. "
    "A figure at tp P is ONE rank's work (rank 0 of P) on one device: no rank communicates."
)
WHAT_COLUMNS_MEAN = (
    "us: median of a step (p10 to p90). MB: bytes that the step must read, each once. of copy: "
    "share of the bandwidth of a device-to-device copy in the same run, read plus write. "
    "Last columns: how many times as long as flashhead that way takes."
)


@dataclass(frozen=True)
class Verdict:
    """A target and what was measured against it. met: None where the target is not for this."""

    text: str
    met: bool | None


def verdicts(frame: pd.DataFrame) -> list[Verdict]:
    """The issue's targets, for each model at tp 1 and batch 1."""
    found: list[Verdict] = []
    single = frame[(frame["tp_size"] == 1) & (frame["batch_size"] == 1)]
    for model, rows in single.groupby("model", sort=False):
        by_way = rows.set_index("way")
        if FLASHHEAD not in by_way.index:
            continue
        own = by_way.loc[FLASHHEAD]
        on = f"{model}, tp 1, batch 1, on {own['device']}"
        floor_us = own["read_bytes"] / own["copy_gb_per_s"] / 1e3
        limit_us = _FLOOR_FACTOR * floor_us + _FLOOR_US
        text = (
            f"{on}: flashhead {own['median_us']:.1f} us, target at most 1.5 x "
            f"({own['read_bytes'] / 1e6:.1f} MB / {own['copy_gb_per_s']:,.0f} GB/s = "
            f"{floor_us:.1f} us) + 4 us = {limit_us:.1f} us"
        )
        found.append(_judged(text, str(own["device"]), met=bool(own["median_us"] <= limit_us)))
        for way, (least, words) in _TARGET_RATIOS.items():
            if way in by_way.index:
                ratio = _ratio(by_way, way)
                text = f"{on}: {ratio:.1f} times as fast as {words}, target at least {least:.0f}"
                found.append(_judged(text, str(own["device"]), met=ratio >= least))
    return found


def _ratio(by_way: pd.DataFrame, way: str) -> float:
    """How many times as long as flashhead the way takes in a cell."""
    return float(by_way["times_flashhead"].to_dict()[way])


def _judged(text: str, device: str, *, met: bool) -> Verdict:
    if TARGET_DEVICE not in device:
        return Verdict(f"{text}: not judged, the target is for an {TARGET_DEVICE}", None)
    return Verdict(f"{text}: {'MET' if met else 'MISSED'}", met)


def _cells(frame: pd.DataFrame) -> Iterator[dict[str, str]]:
    """One line a cell in which flashhead was measured, as text by column."""
    keys = ["model", "tp_size", "batch_size"]
    for (model, tp_size, batch_size), rows in frame.groupby(keys, sort=False):
        by_way = rows.set_index("way")
        if FLASHHEAD not in by_way.index:
            continue
        own = by_way.loc[FLASHHEAD]
        line = {
            "model": f"{model!s} ({own['vocab_size']:,} x {own['hidden_size']:,})",
            "tp": str(tp_size),
            "batch": str(batch_size),
            "flashhead us": f"{own['median_us']:,.1f}",
            "p10 to p90": f"{own['p10_us']:,.1f} to {own['p90_us']:,.1f}",
            "MB": f"{own['read_bytes'] / 1e6:,.1f}",
            "GB/s": f"{own['gb_per_s']:,.0f}"
            if own["gb_per_s"] >= 10
            else f"{own['gb_per_s']:.2f}",
            "of copy": f"{own['share_of_copy']:.0%}",
        }
        for way, words in _OTHER_WAYS.items():
            if (frame["way"] == way).any():
                here = way in by_way.index
                line[words] = f"{_ratio(by_way, way):.2f}" if here else ""
        yield line


def make_tables(frame: pd.DataFrame) -> list[Table]:
    """One rich table a model."""
    tables = []
    for _, rows in frame.groupby("model", sort=False):
        lines = list(_cells(rows))
        if not lines:
            continue
        table = Table(
            title=f"{lines[0]['model']} on {rows['device'].iloc[0]}",
            caption=f"{WHAT_IS_MEASURED} {WHAT_COLUMNS_MEAN}",
            caption_justify="left",
            title_justify="left",
        )
        columns = [column for column in lines[0] if column != "model"]
        for column in columns:
            table.add_column(
                column,
                justify="right",
                no_wrap=column == "p10 to p90",
                min_width=max(len(word) for word in column.split()),
            )
        for line in lines:
            table.add_row(*(line[column] for column in columns))
        tables.append(table)
    return tables


def markdown(frame: pd.DataFrame, environment: Mapping[str, Any], notes: Sequence[str]) -> str:
    """A page with its environment, verdicts and table, fit to be committed as it is."""
    device = environment["device"]
    versions = environment["versions"]
    parts = [f"# Head kernels on {device}", ""]
    if not environment["complete"]:
        parts += ["INCOMPLETE: the run ended before all cells were measured.", ""]
    parts += [
        f"Driver {environment['driver']}, torch {versions.get('torch', 'unknown')}, triton "
        f"{versions.get('triton', 'none')}, operations {environment['operations']}, commit "
        f"{environment['commit']}, {environment['time_utc'][:10]}. {environment['timing']}",
        "",
        f"{WHAT_IS_MEASURED} {WHAT_COLUMNS_MEAN}",
        "",
        *(f"- {note}" for note in notes),
        *(f"- {verdict.text}" for verdict in verdicts(frame)),
        "",
    ]
    lines = list(_cells(frame))
    columns = list(lines[0]) if lines else []
    if lines:
        parts.append(f"| {' | '.join(columns)} |")
        parts.append(f"|---|{'---:|' * (len(columns) - 1)}")
    parts += [f"| {' | '.join(line[column] for column in columns)} |" for line in lines]
    parts += _launches(environment["launches"])
    return "\n".join(parts) + "\n"


def _launches(choices: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines on what `flashhead` chose between: medians of one launch and two, on a cold cache."""
    timed = [choice for choice in choices if choice["one_us"] is not None]
    if not timed:
        return []
    lines = [
        "",
        "One launch or two, by shape of the shard: what `flashhead` chose, and by what.",
        "",
    ]
    lines += ["| D | groups | clusters a group | batch | one us | two us | launches |"]
    lines += [f"|{'---:|' * 7}"]
    for choice in timed:
        head = choice["head"]
        lines.append(
            f"| {head['hidden_size']} | {choice['groups']} | {head['clusters']} | "
            f"{choice['batch']} | {choice['one_us']:.1f} | {choice['two_us']:.1f} | "
            f"{choice['launches']} |"
        )
    return lines


def write_files(
    frame: pd.DataFrame, environment: Mapping[str, Any], notes: Sequence[str], folder: Path
) -> list[Path]:
    """Write CSV, Markdown and environment into `folder`, which exists; return their paths."""
    texts = {
        CSV_NAME: frame.to_csv(index=False),
        MARKDOWN_NAME: markdown(frame, environment, notes),
        ENVIRONMENT_NAME: json.dumps(dict(environment), indent=2) + "\n",
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in texts]
