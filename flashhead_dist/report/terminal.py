"""What launch/scale.py prints: a summary of at most 40 lines, or every table with --verbose."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from rich import box
from rich.console import Console
from rich.table import Table

from flashhead_dist.bench.records import Record
from flashhead_dist.bench.run import Run
from flashhead_dist.heads.registry import BASELINE
from flashhead_dist.report.overview import short_table
from flashhead_dist.report.pictures import write_report
from flashhead_dist.report.runs import records_frame
from flashhead_dist.report.serving import write_page
from flashhead_dist.report.tables import print_report, report_console, rich_table, run_sentences

_MOST_ROWS = 14
_MOST_SENTENCES = 5
_HEAD_COLUMNS = [
    *("head", "weight_bytes_per_rank", "peak_bytes_per_rank", "payload_bytes_per_row"),
    *("counted_bytes_per_row", "top1_agreement", "top1_agreement_worst_source"),
]
_WARNINGS = ("SKIPPED", "NOT USED", "BEYOND", "not cached")


def report_run(run: Run, *, verbose: bool, as_json: bool) -> None:
    """Write the summary, plots and page of a run on its first rank, and print it.

    Raises:
        UserError: the folder cannot be written.
    """
    assert run.folder is not None
    assert run.sweep is not None
    records = run.sweep.records
    run.files += write_report(records, run.folder, plots=run.options.plots)
    if run.options.plots:
        run.files.append(write_page(run.folder))
    console = report_console()
    if verbose:
        print_report(records, run.notes, run.files, console)
    else:
        page = run.files[-1] if run.options.plots else run.folder
        print_summary(records, run.notes, console)
        console.print(f"All figures: {page}", markup=False, highlight=False, soft_wrap=True)
    if as_json:
        document = {
            "run_dir": str(run.folder),
            "environment": run.environment,
            "notes": run.notes,
            "records": [asdict(record) for record in records],
        }
        print(json.dumps(document, allow_nan=False), flush=True)


def print_summary(records: Sequence[Record], notes: Sequence[str], console: Console) -> None:
    """Two tables, sentences about the smallest batch, and notes that warn."""
    console.print(step_table(records))
    console.print(head_table(records))
    for sentence in [
        *run_sentences(records),
        *(n for n in notes if any(w in n for w in _WARNINGS)),
    ]:
        console.print(f"- {sentence}", markup=False, highlight=False, soft_wrap=True)


def step_table(records: Sequence[Record]) -> Table:
    """Microseconds a step and times the dense head: a row a head, a column a `tp_size`.

    Larger batches than the smallest are left to the page where the table would be long.
    """
    first, frame = records[0], records_frame(records)
    batches = sorted(int(size) for size in frame["batch_size"].unique())
    if frame["head"].nunique() * len(batches) > _MOST_ROWS:
        batches = batches[:1]
    model = f"{first.model} (SYNTHETIC)" if first.synthetic else first.model
    setting = f"{model}, {first.dtype}, {first.system}"
    table = _table(f"Microseconds a step (times {BASELINE}): {setting}")
    for place, heading in enumerate(("batch", *short_table(frame, batches[0]))):
        table.add_column(heading, justify="left" if place == 1 else "right", no_wrap=place == 1)
    for batch in batches:
        for row in short_table(frame, batch).itertuples(index=False):
            table.add_row(str(batch), *row)
        table.add_section()
    return table


def head_table(records: Sequence[Record]) -> Table:
    """Bytes of a rank and agreement with the dense head, at the largest `tp_size`."""
    frame = records_frame(records)
    tp_size = frame["tp_size"].max()
    largest = frame[frame["tp_size"] == tp_size].drop_duplicates("head")
    return rich_table(f"At tp {tp_size}", largest[_HEAD_COLUMNS])


def _table(title: str) -> Table:
    return Table(
        title=title,
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
