"""Tables from a frame and the declared columns: on a terminal, and what the page's template asks.

A measured and a projected figure never share a column: rows of both kinds make two tables.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table

from flashhead_dist.bench.records import Record
from flashhead_dist.report.columns import column_of
from flashhead_dist.report.overview import sentences
from flashhead_dist.report.runs import record_warnings, records_frame, table_frame

MARKED = ("better", "worse")
_MIN_WIDTH = 132
"""The widest table; a pipe or file that is narrower has no reason to break it."""


def by_kind(frame: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """(title, frame) of the measured and the projected rows, without columns that hold nothing.

    Of a comparison, changes beyond the noise come first, in a table of their own.
    """
    if frame.empty:
        return []
    if "verdict" in frame:
        marked = frame[frame["verdict"].isin(MARKED)]
        views = [("Beyond the noise", marked), ("All figures that both runs have", frame)]
        return [view for view in views if len(view[1])]
    measured = frame.columns[frame.columns.str.startswith("measured_")]
    projected = frame.columns[frame.columns.str.startswith("projected_")]
    if projected.empty:
        return [("Figures", frame)]
    # A row without any of either kind is an oversubscribed one whose exchange nobody knows.
    is_measured = frame[measured].notna().any(axis="columns")
    views = [
        ("Measured", frame[is_measured].drop(columns=projected)),
        ("PROJECTED, not measured", frame[~is_measured].drop(columns=measured)),
    ]
    return [(title, rows.dropna(axis="columns", how="all")) for title, rows in views if len(rows)]


def rich_table(title: str, frame: pd.DataFrame, *, caption: str = "") -> Table:
    """A terminal's table of a frame: headings and formats of its columns' declarations."""
    table = Table(
        title=title, caption=caption, title_justify="left", caption_justify="left",
        box=box.SIMPLE_HEAD, pad_edge=False
    )  # fmt: skip
    columns = [column_of(str(key)) for key in frame]
    for column in columns:
        is_text = not column.format
        table.add_column(
            column.title, justify="left" if is_text else "right", no_wrap=column.key == "head"
        )
    for row in frame.itertuples(index=False):
        table.add_row(*(column.write(value) for column, value in zip(columns, row, strict=True)))
    return table


def run_tables(records: Sequence[Record]) -> list[Table]:
    """All tables of a run for --verbose: latency, bytes, memory and agreement."""
    frame = records_frame(records)
    tables = [
        rich_table(f"Latency, batch {batch_size}: {title}", rows)
        for batch_size, batch in frame.groupby("batch_size")
        for title, rows in by_kind(table_frame(batch, "latency").drop(columns="batch_size"))
    ]
    sending = frame[frame["tp_size"] > 1]
    if len(sending):
        wire = table_frame(sending, "wire").drop(columns="counted_reason", errors="ignore")
        tables.append(rich_table("Bytes on the wire", wire))
    first = frame.drop_duplicates(["tp_size", "head"])
    tables.append(rich_table("Memory of a rank", table_frame(first, "memory")))
    if first["top1_agreement"].notna().any():
        tables.append(rich_table("Agreement with the dense head", table_frame(first, "fidelity")))
    return tables


def run_sentences(records: Sequence[Record]) -> list[str]:
    """Warnings of a run, then sentences about its smallest batch size."""
    if not records:
        return ["Nothing was measured."]
    frame = records_frame(records)
    return [*record_warnings(records), *sentences(frame, int(frame["batch_size"].min()))]


def print_report(
    records: Sequence[Record], notes: Iterable[str], paths: Iterable[Path], console: Console
) -> None:
    """Print all tables of a run, then sentences, notes and the files written."""
    for table in run_tables(records):
        console.print(table)
        console.print()
    for sentence in [*run_sentences(records), *notes]:
        console.print(f"- {sentence}", markup=False, highlight=False)
    console.print()
    for path in paths:
        console.print(f"wrote {path}", markup=False, highlight=False, soft_wrap=True)


def report_console() -> Console:
    """A console on stdout that does not break tables where stdout is not a terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=max(_MIN_WIDTH, console.width))
