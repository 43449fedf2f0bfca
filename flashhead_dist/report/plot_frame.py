"""What the pictures of a run have in common: panels, colours, legend, title and notes."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from flashhead_dist.bench.records import Record
from flashhead_dist.heads.base import HeadStyle
from flashhead_dist.heads.registry import HEADS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

PROJECTED_GROUND = "#F0F0F0"

_MARKER_SIZES = {"*": 9.5, "D": 5.0, "s": 5.5}
_MAX_COLUMNS = 4
_PANEL_INCHES = (3.3, 3.6)
_LEGEND_INCHES = 2.1
_CHARACTERS_AN_INCH = 16


def style_of(head: str) -> dict[str, Any]:
    """matplotlib's colour, marker and sizes of a head."""
    style = HEADS[head].style if head in HEADS else HeadStyle()
    size = _MARKER_SIZES.get(style.marker, 6.0)
    return {**asdict(style), "markersize": size, "linewidth": 1.5}


def is_head(name: str) -> bool:
    """Whether a head of that name has a style of its own."""
    return name in HEADS


def key(label: str, **style: Any) -> Line2D:
    """An entry of the legend that says what a kind of mark means, whatever its head."""
    from matplotlib.lines import Line2D

    look: dict[str, Any] = {
        "color": "#333333",
        "linestyle": "none",
        "linewidth": 1.2,
        "markersize": 5.5,
    } | style
    return Line2D([], [], label=label, **look)


def by_batch(records: Sequence[Record]) -> list[tuple[int, list[Record]]]:
    """Records by batch size, ascending."""
    sizes = sorted({record.batch_size for record in records})
    return [(size, [r for r in records if r.batch_size == size]) for size in sizes]


def heads_of(records: Sequence[Record]) -> list[str]:
    """The heads in their order in `records`."""
    return list(dict.fromkeys(record.head for record in records))


def make_panels(number: int) -> tuple[Figure, list[Axes]]:
    """A figure with `number` panels that share the vertical axis, in rows of four at most."""
    from matplotlib.figure import Figure

    columns = min(number, _MAX_COLUMNS)
    rows = -(-number // columns)
    width, height = _PANEL_INCHES
    size = (max(width * columns, 4.4) + _LEGEND_INCHES, height * rows + 1.3)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    panels = [axes for row in grid for axes in row]
    for unused in panels[number:]:
        unused.remove()
    return figure, panels[:number]


def finish(
    figure: Figure,
    panels: Sequence[Axes],
    records: Sequence[Record],
    title: str,
    kinds: Sequence[Line2D],
    notes: Sequence[str],
) -> None:
    """Title, labels, legend of heads and of kinds of marks, notes and provenance below."""
    first = records[0]
    for axes, (batch_size, _) in zip(panels, by_batch(records), strict=True):
        axes.set_title(f"batch {batch_size}", fontsize=10)
        axes.set_xlabel("tp_size (ranks)")
        axes.grid(visible=True, which="major", axis="y", alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    model = f"{first.model} (SYNTHETIC)" if first.synthetic else first.model
    figure.suptitle(f"{title}: {model}, {first.dtype}", x=0.01, ha="left", fontsize=11)
    heads = [key(head, **style_of(head)) for head in heads_of(records)]
    figure.legend(handles=[*heads, *kinds], loc="outside right center", frameon=False, fontsize=9)
    threads = f"{first.threads_per_rank} thread{'' if first.threads_per_rank == 1 else 's'} a rank"
    origin = (
        f"{first.system}: {first.device}, {first.backend}, {threads}; commit {first.commit}, "
        f"{first.time_utc[:10]}."
    )
    width = round(figure.get_figwidth() * _CHARACTERS_AN_INCH)
    lines = [textwrap.fill(text, width) for text in (" ".join(notes), origin)]
    figure.supxlabel("\n".join(lines), fontsize=8, x=0.01, ha="left")
