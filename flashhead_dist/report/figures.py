"""Drawings of the report: styles of heads, charts as SVG, legends, and lines of heads.

A chart is at most as wide as a phone and is not scaled down: wider screens show several side by
side. Text stays text. Data marks are groups of class `mark` with a `<title>` for the pointer.

Measured points are filled and their lines solid; projected ones hollow, dashed and on grey.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import numpy as np
import pandas as pd

from flashhead_dist.errors import UserError
from flashhead_dist.heads.base import HeadStyle
from flashhead_dist.heads.registry import HEADS

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PHONE_PX = 356
"""Width of a chart in CSS pixels: a phone 390 wide less the page's margins."""
_PAGE_PX, _GAP_PX, _LEAST_PX = 1142, 16, 205
PROJECTED_GREY = "#F3F4F6"
GREY = "#6B7280"
PART_COLORS = {
    "centroids": "#56B4E9",
    "candidates": "#0072B2",
    "other": "#9CA3AF",
    "exchange": "#D55E00",
    "waiting": "#F0E442",
}
_MARKER_SIZES = {"*": 9.5, "D": 5.0, "s": 5.5}
_HALF_STEP = 2**0.4
"""Room left and right of the outer sizes, on an axis of base 2."""
_PX_AN_INCH = 96
_SVG = "http://www.w3.org/2000/svg"
_XLINK = "http://www.w3.org/1999/xlink"
_RC: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 8.0,
    "axes.titlesize": 8.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 8.0,
    "axes.edgecolor": GREY,
    "axes.linewidth": 0.7,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": "#374151",
    "ytick.color": "#374151",
    "grid.color": "#E5E7EB",
    "grid.linewidth": 0.7,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "figure.constrained_layout.use": True,
}
_MARKS: dict[str, dict[str, Any]] = {
    "o": {"marker": "o", "linestyle": "none"},
    "o-": {"marker": "o", "linestyle": "-"},
    "hollow": {"marker": "o", "linestyle": "none", "markerfacecolor": "white"},
    "hollow--": {"marker": "o", "linestyle": "--", "markerfacecolor": "white"},
    ":": {"linestyle": ":"},
    "--": {"linestyle": "--"},
}


def require_matplotlib(remedy: str = "run pip install -e '.[report]'") -> None:
    """Raise UserError where matplotlib or jinja2 is missing."""
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError(f"plots need {error.name}, which is not installed: {remedy}") from error


def style_of(head: str) -> dict[str, Any]:
    """matplotlib's colour, marker, order and sizes of a head, as its class states them."""
    style = HEADS[head].style if head in HEADS else HeadStyle()
    size = _MARKER_SIZES.get(style.marker, 6.0)
    return {**asdict(style), "markersize": size, "linewidth": 1.5}


@dataclass(frozen=True)
class Section:
    """One part of the page, about one run or about all.

    key: of its CSV file and anchor. charts: `<figure>` elements in a grid of `columns`. legend: of
    (mark, meaning), see `figures.legend_svg`. missing: why there is nothing to show, or empty.
    """

    key: str
    title: str
    notes: Sequence[str] = ()
    frame: pd.DataFrame = field(default_factory=pd.DataFrame)
    charts: Sequence[str] = ()
    columns: int = 1
    legend: Sequence[tuple[str, str]] = ()
    missing: str = ""


def head_legend(heads: Sequence[str]) -> list[tuple[str, str]]:
    """Legend entries of heads."""
    return [(head, head) for head in heads]


def column_width(columns: int) -> int:
    """Width in pixels of each of so many charts side by side."""
    return max(_LEAST_PX, min(PHONE_PX, (_PAGE_PX - _GAP_PX * (columns - 1)) // max(1, columns)))


class Chart:
    """A plot while it is drawn; `html()` ends it.

    key: unique on a page, of letters, digits and hyphens. cell: its column in the section's grid,
    from 1, and the number of columns.
    """

    def __init__(
        self, key: str, title: str, cell: tuple[int, int] = (1, 1), *, height_px: int = 260
    ) -> None:
        from matplotlib import rc_context
        from matplotlib.figure import Figure

        self.key, self.title, self.place = key, title, cell[0]
        self._marks: list[str] = []
        self._rc = _RC | {"svg.hashsalt": key}
        with rc_context(self._rc):
            inches = (column_width(cell[1]) / _PX_AN_INCH, height_px / _PX_AN_INCH)
            self.figure: Figure = Figure(figsize=inches)
            self.axes: Axes = self.figure.subplots()
            self.axes.set_title(title)

    def mark(self, artist: Artist, text: str) -> None:
        """Make an artist a data mark, with the text that a pointer on it shows."""
        artist.set_gid(f"mark{len(self._marks)}")
        self._marks.append(text)

    def point(self, x: float, y: float, text: str, **style: Any) -> None:
        """Draw a mark in matplotlib's style; without one a place for the pointer that is unseen."""
        style = style or {"marker": "o", "markersize": 9, "alpha": 0.0}
        (line,) = self.axes.plot([x], [y], **style | {"linestyle": "none"})
        self.mark(line, text)

    def html(self) -> str:
        """A `<figure>` of a page."""
        from matplotlib import rc_context

        text = io.StringIO()
        with rc_context(self._rc):
            self.figure.savefig(text, format="svg", facecolor="none", metadata={"Date": None})
        svg = embed_svg(text.getvalue(), self.key, self.title, self._marks)
        marks = f'data-marks="{len(self._marks)}"'
        return f'<figure id="plot-{self.key}" {marks} style="--place: {self.place}">{svg}</figure>'


def embed_svg(text: str, key: str, title: str, marks: Sequence[str] = ()) -> str:
    """Make matplotlib's SVG document an element of a page among others of its kind.

    Ids are unique per document only: those that are referred to get `key` in front, others go. The
    group of id `mark<n>` becomes one of class `mark` whose `<title>` is `marks[n]`. Metadata go,
    and so does the style sheet, which would hold for the whole page.
    """
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    root = ElementTree.fromstring(text)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith("}metadata") or child.tag == f"{{{_SVG}}}style":
                parent.remove(child)
    referred = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', text))
    for element in root.iter():
        _rename(element, key, referred, marks)
    _, _, width, height = root.get("viewBox", "0 0 1 1").split()
    root.attrib.pop("height", None)
    # Points of matplotlib to pixels.
    root.set("width", f"{float(width) * _PX_AN_INCH / 72:.0f}")
    root.set("style", f"aspect-ratio: {float(width):.0f} / {float(height):.0f}")
    root.set("role", "img")
    root.set("aria-label", title)
    return ElementTree.tostring(root, encoding="unicode")


def _rename(
    element: ElementTree.Element, key: str, referred: set[str], marks: Sequence[str]
) -> None:
    for name, value in list(element.attrib.items()):
        if name in ("d", "x", "y", "width", "height", "transform"):
            # A hundredth of a point is finer than any screen, and a page holds thousands.
            element.set(name, re.sub(r"(\.\d\d)\d+", r"\1", value))
        elif name == "id":
            del element.attrib["id"]
            if value in referred:
                element.set("id", f"{key}-{value}")
            elif (found := re.fullmatch(r"mark(\d+)", value)) is not None:
                element.set("class", "mark")
                title = ElementTree.Element(f"{{{_SVG}}}title")
                title.text = marks[int(found[1])]
                element.insert(0, title)
        elif name == f"{{{_XLINK}}}href":
            del element.attrib[name]
            element.set("href", f"#{key}-{value.removeprefix('#')}")
        elif "url(#" in value:
            element.set(name, value.replace("url(#", f"url(#{key}-"))


def legend_svg(mark: str, key: str) -> str:
    """A small drawing of a mark: a key of `_MARKS`, a head's name, or a colour for a filled box."""
    return _legend_svg(mark).replace("key-somewhere", key)


@cache
def _legend_svg(mark: str) -> str:
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Rectangle

    text = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": mark}):
        figure = Figure(figsize=(26 / _PX_AN_INCH, 14 / _PX_AN_INCH))
        if mark.startswith("#"):
            figure.add_artist(Rectangle((0.2, 0.15), 0.6, 0.7, color=mark))
        else:
            look = {"color": "#4B5563"} | _MARKS[mark] if mark in _MARKS else style_of(mark)
            look = {"markersize": 6.0, "linewidth": 1.3} | look
            look["markersize"] = min(look["markersize"], 7.0)
            figure.add_artist(Line2D([0.08, 0.5, 0.92], [0.5] * 3, markevery=[1], **look))
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return embed_svg(text.getvalue(), "key-somewhere", "")


def draw_heads(
    axes: Axes, frame: pd.DataFrame, y: str, heads: Sequence[str], *, low: str = "", high: str = ""
) -> None:
    """A line a head of column `y` against `tp_size`, with bars from `low` to `high`.

    Projected points (`measured` false) are hollow, their line dashed and their sizes on grey.
    """
    grey_out_projected(axes, frame)
    for position, head in enumerate(heads):
        style = style_of(head)
        own = frame[(frame["head"] == head) & frame[y].notna()].sort_values("tp_size")
        shift = beside(position, len(heads))
        measured, projected = own[own["measured"]], own[~own["measured"]]
        if len(measured):
            axes.plot(measured["tp_size"] * shift, measured[y], linestyle="-", **style)
            if low:
                axes.vlines(
                    measured["tp_size"] * shift,
                    measured[low],
                    measured[high],
                    color=style["color"],
                    linewidth=1.0,
                )
        if len(projected):
            # The dashed line starts at the last measured point, whose own marker is drawn already.
            joined = pd.concat([measured[-1:], projected])
            axes.plot(
                joined["tp_size"] * shift, joined[y], "--", color=style["color"], linewidth=1.0
            )
            hollow = {"linestyle": "none", "markerfacecolor": "white"}
            axes.plot(projected["tp_size"] * shift, projected[y], **style | hollow)
    size_axis(axes, sorted(frame["tp_size"].unique()))


def head_chart(
    key: str,
    title: str,
    frame: pd.DataFrame,
    y: str,
    text: str,
    heads: Sequence[str],
    cell: tuple[int, int],
) -> Chart:
    """A chart of `draw_heads`, with bars if the frame has `low`; text: formats a figure."""
    chart = Chart(key, title, cell)
    ends = {"low": "low", "high": "high"} if "low" in frame else {}
    draw_heads(chart.axes, frame, y, heads, **ends)
    chart.axes.set_xlabel("tp_size (ranks)")
    for row in frame[frame[y].notna()].to_dict("records"):
        kind = "" if row["measured"] else " (PROJECTED)"
        shown = f"{row['head']}, tp {row['tp_size']}: {text.format(row[y])}{kind}"
        x = row["tp_size"] * beside(list(heads).index(row["head"]), len(heads))
        chart.point(x, row[y], shown)
    return chart


def line(chart: Chart, x: pd.Series, y: pd.Series, text: str, **style: Any) -> None:
    """A thin line with a mark at each point; text: formats x and y for the pointer."""
    chart.axes.plot(x, y, color=style["color"], linewidth=1.2)
    for at, value in zip(x, y, strict=True):
        chart.point(at, value, text.format(at, value), **style)


def beside(position: int, number: int) -> float:
    """A factor of `tp_size` at which points of one size do not hide each other's bars."""
    return float(2 ** (0.03 * (position - (number - 1) / 2)))


def grey_out_projected(axes: Axes, frame: pd.DataFrame) -> None:
    """Grey behind the projected sizes, from half-way to the last one measured."""
    sizes = frame.loc[~frame["measured"], "tp_size"]
    if sizes.empty:
        return
    first, last = sizes.min(), frame["tp_size"].max()
    before = frame.loc[frame["measured"] & (frame["tp_size"] < first), "tp_size"]
    start = first / _HALF_STEP if before.empty else (first * before.max()) ** 0.5
    stop = last * _HALF_STEP
    axes.axvspan(start, stop, color=PROJECTED_GREY, linewidth=0, zorder=0)
    axes.text(
        (start * stop) ** 0.5,
        0.985,
        "PROJECTED",
        transform=axes.get_xaxis_transform(),
        ha="center",
        va="top",
        fontsize=7,
        color="#555555",
    )


def draw_ideal(axes: Axes, frame: pd.DataFrame, baseline: str) -> None:
    """What the baseline would take if its step at tp 1 were divided by the ranks."""
    single = frame[(frame["head"] == baseline) & (frame["tp_size"] == 1)]["median_us"].dropna()
    sizes = np.array(sorted(frame["tp_size"].unique()))
    for us in single:
        axes.plot(sizes, us / sizes, color="#777777", linestyle=":", linewidth=1.2, zorder=1)


def size_axis(axes: Axes, sizes: Sequence[int]) -> None:
    """A horizontal axis of base 2 that is marked at `sizes` alone."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.xaxis.minorticks_off()
    axes.set_xlim(sizes[0] / _HALF_STEP, sizes[-1] * _HALF_STEP)


def log_numbers(axes: Axes) -> None:
    """A logarithmic vertical axis marked 1, 2, 5, 10 in plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}")
    )
    axes.yaxis.minorticks_off()


def draw_bytes(axes: Axes, frame: pd.DataFrame, heads: Sequence[str], sizes: Sequence[int]) -> None:
    """Bytes that a rank sends for one row: rings analytic, points counted, a line between them."""
    from matplotlib.ticker import EngFormatter, LogLocator

    for head in heads:
        own = frame[(frame["head"] == head) & (frame["sent_bytes_per_row"] > 0)]
        x = byte_places(own, heads, sizes)
        style = style_of(head) | {"linestyle": "none"}
        ring = {"markersize": 1.5 * style["markersize"], "markerfacecolor": "none"}
        axes.plot(x, own["sent_bytes_per_row"], **style | ring)
        counted = own.loc[own["counted_bytes_per_row"] > 0, "counted_bytes_per_row"]
        x = x[counted.index]
        axes.plot(x, counted, **style)
        sent = own.loc[counted.index, "sent_bytes_per_row"]
        axes.vlines(x, sent, counted, color=style["color"], linewidth=0.8)
    axes.set_yscale("log")
    axes.set_xticks(range(len(sizes)), [str(size) for size in sizes])
    axes.set_xlim(-0.5, len(sizes) - 0.5)
    for edge in range(1, len(sizes)):
        axes.axvline(edge - 0.5, color="#BBBBBB", linewidth=0.8)
    axes.yaxis.set_major_locator(LogLocator(numticks=12))
    axes.yaxis.set_major_formatter(EngFormatter(unit="B", places=0))
    axes.yaxis.minorticks_off()


def byte_places(frame: pd.DataFrame, heads: Sequence[str], sizes: Sequence[int]) -> pd.Series:
    """Where `draw_bytes` draws each row: the column of its size, beside other heads."""
    column = frame["tp_size"].map(list(sizes).index)
    position = frame["head"].map(list(heads).index)
    return column + 0.78 * (position - (len(heads) - 1) / 2) / len(heads)
