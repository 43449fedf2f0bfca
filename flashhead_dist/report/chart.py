"""One plot of the page: drawn by matplotlib, written as SVG that stands in a page of HTML.

A plot is as wide as a phone and is never scaled down to fit one: wider screens show more of them
side by side. Text stays text. Data marks are groups of class `mark` with a `<title>` in words.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from flashhead_dist.report.section import Plot

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

WIDTH_PX = 356
"""Of a plot in CSS pixels: a phone 390 wide less the page's margins."""
_PX_AN_INCH = 96
_SVG = "http://www.w3.org/2000/svg"
_LENGTHS = ("d", "x", "y", "width", "height", "transform")
_XLINK = "http://www.w3.org/1999/xlink"
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 8.0,
    "axes.titlesize": 8.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 8.0,
    "axes.edgecolor": "#6B7280",
    "axes.linewidth": 0.7,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "xtick.color": "#374151",
    "ytick.color": "#374151",
    "grid.color": "#E5E7EB",
    "grid.linewidth": 0.7,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "figure.constrained_layout.use": True,
}


class Chart:
    """A plot while it is drawn; `plot()` ends it.

    key: unique on a page, and all letters, digits and hyphens. words: its title.
    """

    def __init__(self, key: str, words: str, *, height_px: int = 270) -> None:
        from matplotlib import rc_context
        from matplotlib.figure import Figure

        self.key, self.words = key, words
        self._rc = dict(_STYLE) | {"svg.hashsalt": key}
        self._marks: list[str] = []
        with rc_context(self._rc):
            inches = (WIDTH_PX / _PX_AN_INCH, height_px / _PX_AN_INCH)
            self.figure = Figure(figsize=inches)
            self.axes: Axes = self.figure.subplots()
            self.axes.set_title(words)

    def mark(self, artists: Artist | Sequence[Artist], words: str) -> None:
        """Count an artist as a data mark, with what a pointer resting on it is told."""
        for artist in [artists] if not isinstance(artists, Sequence) else artists:
            artist.set_gid(f"mark{len(self._marks)}")
            self._marks.append(words)

    def point(self, x: float, y: float, words: str, **style: Any) -> None:
        """Draw a single mark at a place; style: matplotlib's."""
        (line,) = self.axes.plot([x], [y], **({"linestyle": "none"} | style))
        self.mark(line, words)

    def spot(self, x: float, y: float, words: str) -> None:
        """A place to rest a pointer on, over a mark that is drawn already."""
        self.point(x, y, words, marker="o", markersize=9, alpha=0.0)

    def plot(self, row: str = "") -> Plot:
        """Write it as SVG; row: see `Plot`."""
        from matplotlib import rc_context

        text = io.StringIO()
        with rc_context(self._rc):
            self.figure.savefig(text, format="svg", facecolor="none", metadata={"Date": None})
        return Plot(
            key=self.key,
            words=self.words,
            svg=embed_svg(text.getvalue(), self.key, self.words, self._marks),
            num_marks=len(self._marks),
            row=row,
        )


def embed_svg(text: str, key: str, words: str, marks: Sequence[str] = ()) -> str:
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
    # Points of matplotlib, as wide as they were asked for.
    root.set("width", f"{float(width) * _PX_AN_INCH / 72:.0f}")
    root.set("style", f"aspect-ratio: {float(width):.0f} / {float(height):.0f}")
    root.set("role", "img")
    root.set("aria-label", words)
    return ElementTree.tostring(root, encoding="unicode")


def _rename(
    element: ElementTree.Element, key: str, referred: set[str], marks: Sequence[str]
) -> None:
    for name, value in list(element.attrib.items()):
        if name in _LENGTHS:
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
