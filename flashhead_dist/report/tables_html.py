"""A section's frame as tables of a page: measured and projected figures in tables of their own."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from flashhead_dist.report.columns import MISSING, column_of

_TEXT = (
    "head", "system", "carried_by", "worst_source", "schedule", "verdict", "figure", "fact", "run",
)  # fmt: skip
_LEFT_OUT = ("counted_reason",)
"""Columns of the CSV file that a table has no room for; notes tell what they say."""
_FEW_ROWS = 12
MARKED = ("better", "worse")


@dataclass(frozen=True)
class TableView:
    """What the template writes: headings, and rows of (text, whether it is a number).

    classes: of each row; `better` and `worse` where a verdict says so.
    """

    title: str
    projected: bool
    headings: tuple[tuple[str, bool], ...]
    rows: tuple[tuple[tuple[str, bool], ...], ...]
    classes: tuple[str, ...]

    def starts_open(self, *, below_plots: bool) -> bool:
        """Whether the table starts unfolded: a short one where no plot shows its figures."""
        marked = bool(self.classes) and all(name in MARKED for name in self.classes)
        return len(self.rows) <= _FEW_ROWS and (marked or not below_plots)


def table_views(frame: pd.DataFrame) -> list[TableView]:
    """One table, or one of the measured and one of the projected rows where the frame has both.

    Of a comparison, the changes beyond the noise come first, in a table of their own.
    """
    if frame.empty:
        return []
    if "verdict" in frame:
        marked = frame[frame["verdict"].isin(MARKED)]
        views = [] if marked.empty else [_view("Beyond the noise", marked, projected=False)]
        return [*views, _view("All figures that both runs have", frame, projected=False)]
    measured = [str(name) for name in frame if str(name).startswith("measured_")]
    projected = [str(name) for name in frame if str(name).startswith("projected_")]
    if not projected:
        return [_view("Figures", frame, projected=False)]
    # A row without any of either kind is an oversubscribed one whose exchange nobody knows.
    is_measured = frame[measured].notna().any(axis="columns") if measured else frame.index < 0
    views = []
    if is_measured.any():
        views.append(_view("Measured", frame[is_measured].drop(columns=projected), projected=False))
    if not is_measured.all():
        rest = frame[~is_measured].drop(columns=measured)
        views.append(_view("PROJECTED, not measured", rest, projected=True))
    return views


def _view(title: str, frame: pd.DataFrame, *, projected: bool) -> TableView:
    shown = frame.dropna(axis="columns", how="all")
    names = [str(name) for name in shown if str(name) not in _LEFT_OUT]
    return TableView(
        title=title,
        projected=projected,
        headings=tuple((column_of(name).heading, name not in _TEXT) for name in names),
        rows=tuple(
            tuple((_cell(name, row[name]), name not in _TEXT) for name in names)
            for _, row in shown.iterrows()
        ),
        classes=tuple(str(value).split()[0] for value in shown["verdict"])
        if "verdict" in shown
        else ("",) * len(shown),
    )


def _cell(name: str, value: object) -> str:
    if value is None or pd.isna(value):  # type: ignore[call-overload]
        return MISSING
    return column_of(name).write(value)  # type: ignore[arg-type]
