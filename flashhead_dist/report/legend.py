"""Legends of the page: a small drawing for each head and kind of mark, made as the plots are."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import cache
from typing import Any

from flashhead_dist.report.chart import embed_svg
from flashhead_dist.report.plot_frame import is_head, style_of
from flashhead_dist.report.section import Section

_SIZE_INCHES = (26 / 96, 14 / 96)
_GREY = "#4B5563"
_PLACE = "key-somewhere"
_KINDS: dict[str, dict[str, Any]] = {
    "o": {"marker": "o", "linestyle": "none"},
    "o-": {"marker": "o", "linestyle": "-"},
    "h": {"marker": "o", "linestyle": "none", "markerfacecolor": "white"},
    "h--": {"marker": "o", "linestyle": "--", "markerfacecolor": "white"},
    ":": {"linestyle": ":"},
    "--": {"linestyle": "--"},
}


@dataclass(frozen=True)
class LegendKey:
    """An entry: an `<svg>` and its meaning."""

    svg: str
    words: str


def legend_keys(section: Section, place: str) -> list[LegendKey]:
    """The heads of a section's plots, then its other kinds of marks.

    place: tells this legend's ids from those of the page's other legends.

    A mark is one of `o`, `o-`, `h` (hollow), `h--`, `:`, `--`, a head's name, or `color:` and a
    colour, for a filled box.
    """
    if not section.plots:
        return []
    wanted = [*((head, head) for head in section.legend), *section.marks]
    return [
        LegendKey(_key_svg(mark).replace(_PLACE, f"key-{section.key}-{place}-{number}"), words)
        for number, (mark, words) in enumerate(wanted)
    ]


@cache
def _key_svg(mark: str) -> str:
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Rectangle

    text = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": mark}):
        figure = Figure(figsize=_SIZE_INCHES)
        if mark.startswith("color:"):
            box = Rectangle((0.2, 0.15), 0.6, 0.7, color=mark.removeprefix("color:"))
            figure.add_artist(box)
        else:
            look = style_of(mark) if is_head(mark) else {"color": _GREY} | _KINDS[mark]
            look = {"markersize": 6.0, "linewidth": 1.3} | look
            look["markersize"] = min(look["markersize"], 7.0)
            figure.add_artist(Line2D([0.08, 0.5, 0.92], [0.5] * 3, markevery=[1], **look))
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return embed_svg(text.getvalue(), _PLACE, "")
