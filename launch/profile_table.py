"""What a folder of profiles shows: each range's time by rank, and the counters of kernels.

    python launch/profile_table.py profile
    python launch/profile_table.py profile --csv profile/ranges.csv

Medians over the captures' ranges. A figure that the tool could not see is a dash, and a line below
says why. Exit code 2 for a folder that holds no profile.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table

from flashhead_profiles.readers import read_profile
from flashhead_profiles.traces import TraceError, medians

_WIDTH = 140


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write every range")
    arguments = parser.parse_args(argv)
    try:
        profile = read_profile(arguments.folder)
        if arguments.csv is not None and profile.timeline is not None:
            profile.timeline.to_csv(arguments.csv, index=False)
    except (TraceError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    console = Console(width=None if sys.stdout.isatty() else _WIDTH)
    missing: dict[str, str] = {}
    if profile.timeline is not None:
        for capture, frame in profile.timeline.groupby("capture", sort=False):
            console.print(
                _table(f"Ranges, capture {capture!s}".removesuffix(", capture "), medians(frame))
            )
        missing |= profile.timeline.attrs["missing"]
    if profile.counters is not None:
        counters = profile.counters.groupby(["kernel", "rank"], sort=False).median().reset_index()
        console.print(_table("Kernels by Nsight Compute, medians", counters))
        missing |= profile.counters.attrs["missing"]
    for column, reason in missing.items():
        console.print(f"- {column} is missing: {reason}.")
    return 0


def _table(title: str, frame: pd.DataFrame) -> Table:
    table = Table(title=title, title_justify="left")
    for name in frame.columns:
        table.add_column(
            str(name), justify="left" if name in ("range", "label", "kernel") else "right"
        )
    for row in frame.itertuples(index=False):
        table.add_row(*(_cell(value) for value in row))
    return table


def _cell(value: Any) -> str:
    if value is None or value != value:
        return "-"
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 1 else f"{value:.3g}"
    return str(value)


if __name__ == "__main__":
    sys.exit(main())
