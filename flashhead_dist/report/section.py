"""What one part of the page holds, whatever it is about: sentences, plots and figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd


@dataclass(frozen=True)
class Plot:
    """One drawn plot.

    key: names it on the page. words: its title, which a screen reader reads. svg: an `<svg>`
    element. num_marks: how many data marks it shows; a test counts them in a browser. row: plots of
    the same row stand side by side, where the page is wide enough.
    """

    key: str
    words: str
    svg: str
    num_marks: int
    row: str = ""


@dataclass(frozen=True)
class Section:
    """One part of the report of one run.

    key: of the section, of its file of figures (`<key>.csv`) and of its anchor. frame: all figures
    of the section, one row a point, measured and projected ones in columns of their own. missing:
    why there is nothing to show, or None. legend: heads whose colours the plots use; marks: the
    other kinds of marks in them, as (mark, meaning).
    """

    key: str
    title: str
    notes: tuple[str, ...] = ()
    frame: pd.DataFrame = field(default_factory=pd.DataFrame)
    plots: tuple[Plot, ...] = ()
    missing: str | None = None
    legend: tuple[str, ...] = ()
    marks: tuple[tuple[str, str], ...] = ()


def frame_of(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """A frame of the rows, without columns that hold nothing."""
    return pd.DataFrame(list(rows)).dropna(axis="columns", how="all")
