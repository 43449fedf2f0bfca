"""Tables, verdicts, picture and files of what `bench.py` measured, and what the run stood on.

A frame holds one row a `Measurement`.
"""

from __future__ import annotations

import json
import re
import subprocess
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from rich.table import Table

from bench_cell import Bench
from bench_ways import (
    DENSE_FUSED,
    DENSE_TORCH,
    FLASHHEAD,
    PUBLISHED_EAGER,
    PUBLISHED_GRAPH,
    TWO_LAUNCHES,
)
from flashhead_dist.bench.environment import software_versions, source_commit
from flashhead_kernels import launch_choice
from flashhead_topology.probe import probe_machine

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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
PNG_NAME = "kernels.png"
# Okabe and Ito's palette, told apart by colour-blind readers; markers differ as well.
_STYLES = {
    DENSE_TORCH: ("dense torch: matmul + max", "#E69F00", "s", "-"),
    DENSE_FUSED: ("dense fused", "#000000", "o", "-"),
    PUBLISHED_EAGER: ("published FlashHead, eager", "#D55E00", "D", "-"),
    PUBLISHED_GRAPH: ("published FlashHead, graph", "#CC79A7", "X", "-"),
    TWO_LAUNCHES: ("flashhead, two launches", "#56B4E9", "v", "--"),
    FLASHHEAD: ("flashhead", "#0072B2", "*", "-"),
}
_FLOOR = "flashhead's bytes over\nthe copy bandwidth"
_PANEL_INCHES = (3.0, 2.5)
_LEGEND_INCHES = 2.5
_CHARACTERS_AN_INCH = 16
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


def draw(frame: pd.DataFrame, note: str, path: Path) -> None:
    """Draw the frame's cells into `path`; `note` stands below them.

    Raises ImportError without matplotlib, OSError where the file cannot be written.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    models = list(frame["model"].unique())
    tp_sizes = sorted(frame["tp_size"].unique())
    width, height = _PANEL_INCHES
    size = (max(width * len(tp_sizes), 4.5) + _LEGEND_INCHES, height * len(models) + 1.6)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(models), len(tp_sizes), sharey="row", squeeze=False)
    for axes_row, model in zip(grid, models, strict=True):
        for axes, tp_size in zip(axes_row, tp_sizes, strict=True):
            cell = frame[(frame["model"] == model) & (frame["tp_size"] == tp_size)]
            _panel(axes, cell, f"{model}, one rank of tp {tp_size}")
        axes_row[0].set_ylabel("microseconds a step")
    for axes in grid[-1]:
        axes.set_xlabel("batch size")
    handles = [
        Line2D([], [], **_style(way), label=words)
        for way, (words, *_) in _STYLES.items()
        if (frame["way"] == way).any()
    ]
    handles.append(Line2D([], [], color="#777777", linestyle=":", label=_FLOOR))
    figure.legend(handles=handles, loc="outside right center", frameon=False, fontsize=9)
    device = frame["device"].iloc[0]
    figure.suptitle(f"Head kernels on {device} (SYNTHETIC weights)", x=0.01, ha="left", fontsize=11)
    text = textwrap.fill(note, round(size[0] * _CHARACTERS_AN_INCH))
    figure.supxlabel(text, fontsize=8, x=0.01, ha="left")
    figure.savefig(path, dpi=150)


def _panel(axes: Axes, cell: pd.DataFrame, title: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for way in _STYLES:
        rows = cell[cell["way"] == way].sort_values("batch_size")
        if rows.empty:
            continue
        axes.plot(rows["batch_size"], rows["median_us"], **_style(way))
        axes.vlines(
            rows["batch_size"], rows["p10_us"], rows["p90_us"], color=_style(way)["color"], lw=1.0
        )
    own = cell[cell["way"] == FLASHHEAD].sort_values("batch_size")
    floor = own["read_bytes"] / own["copy_gb_per_s"] / 1e3
    axes.plot(own["batch_size"], floor, color="#777777", linestyle=":", linewidth=1.2)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sorted(cell["batch_size"].unique()))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_minor_locator(LogLocator(base=2, subs=()))
    axes.set_title(title, fontsize=9)
    axes.grid(visible=True, which="major", axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _style(way: str) -> dict[str, Any]:
    _, color, marker, line = _STYLES[way]
    return {
        "color": color,
        "marker": marker,
        "linestyle": line,
        "linewidth": 1.5,
        "markersize": 9.0 if marker == "*" else 5.0,
    }


def device_name(device: str) -> str:
    """Name of the GPU, or of the CPU and its threads, by which every figure is labelled."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{probe_machine().cpu_model} (CPU, {torch.get_num_threads()} threads)"


def device_slug(name: str) -> str:
    """A name for a folder: `NVIDIA H200` -> `nvidia-h200`."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def make_environment(
    bench: Bench, arguments: Mapping[str, Any], *, complete: bool
) -> dict[str, Any]:
    """JSON form of what the figures depend on; `complete`: all cells asked for were measured."""
    on_gpu = bench.clock.device.type == "cuda"
    cache = f"{bench.clock.cache_bytes / 1e6:.0f} MB of last-level cache"
    timing = (
        f"CUDA events around graph replays; weights rotated past {cache}; ways interleaved."
        if on_gpu
        else "CPU: wall clock, no graphs, caches not emptied; this shows that the code runs, "
        "not how fast a GPU is."
    )
    versions, commit, driver = software_versions(), source_commit(), _driver() if on_gpu else "none"
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {
        "device": bench.device_name,
        "driver": driver,
        "cache_bytes": bench.clock.cache_bytes,
        "operations": bench.ops.__name__,
        "launches": launch_choice.table.choices(),
        "timing": timing,
        "versions": versions,
        "commit": commit,
        "time_utc": now,
        "complete": complete,
        "arguments": {key: str(value) for key, value in arguments.items()},
        "summary": f"{timing} {bench.device_name}, driver {driver}, torch "
        f"{versions.get('torch')}, triton {versions.get('triton', 'none')}, "
        f"{bench.ops.__name__}; commit {commit}, {now[:10]}.",
    }


def _driver() -> str:
    """The driver's version, as nvidia-smi says it."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return (done.stdout.splitlines() or ["unknown"])[0].strip()
