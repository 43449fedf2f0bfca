"""The picture of `bench.py`: time against batch size; a row of panels a model, a column a tp."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from bench_ways import (
    DENSE_FUSED,
    DENSE_TORCH,
    FLASHHEAD,
    PUBLISHED_EAGER,
    PUBLISHED_GRAPH,
    TWO_LAUNCHES,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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
