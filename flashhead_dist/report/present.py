"""Everything a person gets from a run: files in its folder, tables and sentences on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from flashhead_dist.bench.records import Record
from flashhead_dist.report.plots import write_plots
from flashhead_dist.report.summary import write_summary
from flashhead_dist.report.tables import head_table, latency_tables
from flashhead_dist.report.words import summary_sentences

_MIN_WIDTH = 132
"""The widest table; a narrower pipe or file has no reason to break it."""


def write_report(records: Sequence[Record], folder: Path, *, plots: bool) -> list[Path]:
    """Write the summary and, where asked for, the plots; return their paths.

    Raises:
        UserError: the folder cannot be written, or matplotlib is missing.
    """
    paths = [write_summary(records, folder)]
    if plots:
        paths += write_plots(records, folder)
    return paths


def print_report(
    records: Sequence[Record], notes: Sequence[str], paths: Sequence[Path], console: Console
) -> None:
    """Print tables, then sentences, notes and the files written."""
    for table in [*latency_tables(records), head_table(records)]:
        console.print(table)
        console.print()
    for sentence in [*summary_sentences(records), *notes]:
        console.print(f"- {sentence}", markup=False, highlight=False)
    console.print()
    for path in paths:
        console.print(f"wrote {path}", markup=False, highlight=False, soft_wrap=True)


def report_console() -> Console:
    """A console on stdout that does not break tables where stdout is not a terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=max(_MIN_WIDTH, console.width))
