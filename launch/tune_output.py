"""What launch/tune.py leaves behind: tables, a picture, the choice."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table

from flashhead_dist.errors import UserError
from flashhead_dist.report.pictures import FRONT_NAME, Mark, write_front
from flashhead_dist.tune.front import Record, curve
from flashhead_dist.tune.settings import Setting

_MOST_ROWS = 14
TABLE_WIDTH = 136
"""Columns of text that the widest table takes: narrower consoles would cut its figures off."""


def write_outputs(
    arguments: argparse.Namespace,
    document: dict[str, Any],
    records: Sequence[Record],
    ours: Sequence[Record],
    front: Sequence[Record],
    timed: Sequence[Record],
) -> list[Path]:
    """Write points.csv, front.csv, chosen.json and the pictures into --out; returns their paths.

    Raises:
        UserError: a file that cannot be written, or a mark that is none.
    """
    marks = [_mark(text) for text in arguments.mark]
    paths = [arguments.out / name for name in ("points.csv", "front.csv", "chosen.json")]
    try:
        pd.DataFrame(records).to_csv(paths[0], index=False, float_format="%.6g")
        pd.DataFrame(timed or front).to_csv(paths[1], index=False, float_format="%.6g")
        paths[2].write_text(json.dumps(document, indent=1) + "\n")
    except OSError as error:
        raise UserError(
            f"{arguments.out} cannot be written ({error.strerror}): give another --out"
        ) from error
    if arguments.skip_plots:
        return paths
    made_up = " (SYNTHETIC)" if document["synthetic"] else ""
    held = ", ".join(document["held_out"])
    title = f"{document['model']}{made_up}: bytes a token against its dense argmax found"
    kinds = [(FRONT_NAME, False, f"{title}, selection states")]
    if held:
        kinds.append((f"held_out_{FRONT_NAME}", True, f"{title},\nfront of texts held out: {held}"))
    for name, held_out, words in kinds:
        path = arguments.out / name
        write_front(
            records, ours, path, title=words, marks=marks, chosen=document["chosen"],
            held_out=held_out,
        )  # fmt: skip
        paths.append(path)
    return paths


def _mark(text: str) -> Mark:
    """Read LABEL=FILE, the file being what `launch/evaluate.py fidelity --json` printed."""
    label, _, name = text.partition("=")
    try:
        found = json.loads(Path(name).read_text().strip().splitlines()[-1])
        return Mark(
            label,
            float(found["bytes_share"]),
            float(found["top1_agreement"]),
            float(found["top1_agreement_worst_source"]),
        )
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise UserError(
            f"--mark {text!r} names no document of launch/evaluate.py fidelity --json ({error}): "
            "give LABEL=FILE"
        ) from error


def show(
    console: Console,
    document: dict[str, Any],
    front: Sequence[Record],
    ours_front: Sequence[Record],
    timed: Sequence[Record],
    paths: Sequence[Path],
) -> None:
    """Print the fronts in the worst source, the choice, and where the rest is."""
    held = bool(document["held_out"])
    times = {_key(r): r for r in timed if r["measured"]}
    for title, records in (
        ("what the head runs", ours_front),
        ("simulated: what no kernel runs yet is here as well, without times", front),
    ):
        table = Table(title=f"Front in the worst source, {title}")
        for column in ("setting", "alpha", "rows", "pins", "bytes, %", "found, %", "worst, %"):
            left = column == "setting"
            table.add_column(column, justify="left" if left else "right", no_wrap=True)
        for column in ("held out, %", "its worst, %") if held else ():
            table.add_column(column, justify="right", no_wrap=True)
        table.add_column("us", justify="right")
        steps = curve(records, "top1_worst")
        for record in steps[:: -(-len(steps) // _MOST_ROWS) or 1]:
            table.add_row(*_cells(record, times.get(_key(record)), held=held))
        console.print(table)
    chosen = document["chosen"]
    if chosen is not None:
        console.print(f"Target: {document['target']}. Chosen of {document['num_points']} points:")
        console.print("  " + ", ".join(_cells(chosen, times.get(_key(chosen)), held=held)))
    if chosen is not None and held:
        console.print(
            f"held out: {', '.join(document['held_out'])}; worst there: "
            f"{chosen['held_out_worst_source']} ({chosen['held_out_worst_states']} states)"
        )
    console.print(
        f"{document['seconds']:.0f} s, {document['cpu_seconds']:.0f} s of processor time, peak "
        f"of {document['peak_resident_bytes'] / 1e9:.2f} GB"
    )
    for path in paths:
        console.print(f"wrote {path}", soft_wrap=True, highlight=False)


def _key(record: Record) -> tuple[Any, ...]:
    names = ("family", "alpha", "probes_per_group", "learned_pins", "frequent_pins", "row_bits")
    return tuple(record[name] for name in names)


def _cells(record: Record, time: Record | None, *, held: bool) -> list[str]:
    cells = [
        Setting.of_record(record).label + (", int8 rows" if record["row_bits"] == 8 else ""),
        f"{record['alpha']:g}",
        f"{record['candidates']:,}",
        f"{record['learned_pins']}+{record['frequent_pins']}",
        f"{100 * record['bytes_share']:.2f}",
        f"{100 * record['top1']:.3f}",
        f"{100 * record['top1_worst']:.2f} {record['worst_source']}",
    ]
    if held:
        cells.append(f"{100 * record['held_out_top1']:.3f}")
        cells.append(f"{100 * record['held_out_top1_worst']:.2f} {record['held_out_worst_source']}")
    cells.append(f"{time['median_us']:,.0f}" if time else "-")
    return cells
