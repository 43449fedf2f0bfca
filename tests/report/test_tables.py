"""Tables and sentences from golden records: what is shown, and what is never shown as measured."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from flashhead_dist.bench.records import Record, read_records
from flashhead_dist.report.tables import head_table, latency_tables
from flashhead_dist.report.words import summary_sentences

DATA = Path(__file__).parent / "data" / "records.jsonl"


@pytest.fixture
def records() -> list[Record]:
    return read_records(DATA)


def shown(table: Table) -> str:
    console = Console(file=io.StringIO(), width=160)
    console.print(table)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


def row(text: str, tp_size: int, head: str) -> list[str]:
    """Cells of the row of a head at a size."""
    for line in text.splitlines():
        cells = line.split()
        if cells[:2] == [str(tp_size), head]:
            return cells[2:]
    raise LookupError(f"no row of {head} at {tp_size} in\n{text}")


def test_each_batch_size_has_a_measured_and_a_projected_table(records: list[Record]) -> None:
    titles = [str(table.title) for table in latency_tables(records)]
    assert titles == [
        "Batch 1: measured",
        "Batch 1: PROJECTED (oversubscribed)",
        "Batch 4: measured",
        "Batch 4: PROJECTED (oversubscribed)",
    ]


def test_no_projected_figure_stands_in_a_measured_table(records: list[Record]) -> None:
    measured, projected = (shown(table) for table in latency_tables(records)[:2])
    assert {line.split()[0] for line in measured.splitlines() if line[:4].strip().isdigit()} == {
        "1",
        "2",
    }
    assert row(projected, 8, "flashhead")
    with pytest.raises(LookupError):
        row(measured, 8, "flashhead")
    assert "OVERSUBSCRIBED: 8 ranks on 2 cores" in projected
    assert "OVERSUBSCRIBED" not in measured


def test_measured_cells(records: list[Record]) -> None:
    text = shown(latency_tables(records)[0])
    assert row(text, 2, "flashhead") == [
        *("2,150", "1,935", "2,580", "2,000", "150"),
        *("9.37", "93", "8", "8", "353"),
    ]
    assert row(text, 1, "flashhead")[-1] == "-"


def test_projected_cells_keep_wall_and_projection_apart(records: list[Record]) -> None:
    cells = row(shown(latency_tables(records)[1]), 8, "flashhead")
    assert cells == ["500", "1,050", "1,550", "3.90", "32", "6,200", "8", "14", "359"]


def test_a_count_that_others_disturbed_is_marked(records: list[Record]) -> None:
    noisy = [
        dataclasses.replace(record, counted_bytes_per_row_greatest=1e6)
        if record.tp_size == 2
        else record
        for record in records
    ]
    text = shown(latency_tables(noisy)[0])
    assert row(text, 2, "flashhead")[-1] == "~353"
    assert "~: bursts differ" in text
    assert "~" not in shown(latency_tables(records)[0])


def test_iterations_are_one_number_or_a_range(records: list[Record]) -> None:
    first, *others = [record for record in records if record.batch_size == 1]
    few = [dataclasses.replace(first, num_iterations=3)]
    many = [dataclasses.replace(record, num_iterations=7) for record in others]
    assert "; 3 iterations a head" in shown(latency_tables(few)[0])
    assert "; 3 to 7 iterations a head" in shown(latency_tables(few + many)[0])


def test_memory_and_agreement(records: list[Record]) -> None:
    text = shown(head_table(records))
    cells = ["0.5", "+0.0", "5.5", "99.60", "98.0", "(Yoruba,", "50)"]
    assert row(text, 2, "flashhead") == cells
    assert "250 test states" in text
    assert "OVERSUBSCRIBED" in text


def test_a_replica_stands_out_in_the_memory_table(records: list[Record]) -> None:
    replicas = [
        dataclasses.replace(record, weight_bytes_per_rank=1_000_000)
        if record.head == "flashhead"
        else record
        for record in records
    ]
    assert row(shown(head_table(replicas)), 8, "flashhead")[1] == "+700.0"


def test_what_is_unknown_is_a_dash(records: list[Record]) -> None:
    unknown = [
        dataclasses.replace(r, peak_bytes_per_rank=None, top1_agreement=None) for r in records
    ]
    cells = row(shown(head_table(unknown)), 1, "flashhead")
    assert cells[2:4] == ["-", "-"]


def test_sentences_say_what_was_found(records: list[Record]) -> None:
    assert " ".join(summary_sentences(records)) == (
        "OVERSUBSCRIBED at tp 8 (8 ranks on 2 cores): figures there are projected from each "
        "rank's compute measured alone, and nothing about speed there was measured. "
        "At batch 1 and tp 1, flashhead takes 4,000 us a step where dense_local_max takes 40,000 "
        "us: 10.0 times as fast. "
        "At batch 1 and tp 2, flashhead takes 2,150 us a step where dense_local_max takes 20,150 "
        "us: 9.4 times as fast. "
        "At batch 1 and tp 8, flashhead is PROJECTED to take 1,550 us a step where "
        "dense_local_max is PROJECTED to take 6,050 us: 3.9 times as fast. "
        "Scaling efficiency of dense_local_max at batch 1: 99 % at tp 2, 83 % at tp 8 (projected). "
        "Scaling efficiency of flashhead at batch 1: 93 % at tp 2, 32 % at tp 8 (projected). "
        "Payload of one greedy step at tp 8: flashhead 8 bytes a row (359 bytes sent a rank and "
        "row as the interface counted them); dense_gather 16,000 bytes a row (14,345 bytes sent a "
        "rank and row as the interface counted them). Below about 1 KB the count is mostly "
        "protocol. "
        "flashhead gives the dense head's token on 99.60 % of 250 test states at every tp_size "
        "measured (1, 2, 8), and on 98.00 % in the worst source (Yoruba, 50 states; "
        "launch/evaluate.py takes all there are)."
    )


def test_synthetic_is_said_first(records: list[Record]) -> None:
    made_up = [dataclasses.replace(record, synthetic=True) for record in records]
    assert summary_sentences(made_up)[0].startswith("The model is SYNTHETIC (tiny)")
    assert "tiny (SYNTHETIC)" in shown(latency_tables(made_up)[0]).replace("\n", " ")


def test_sentences_about_missing_heads_are_left_out(records: list[Record]) -> None:
    only = [record for record in records if record.head == "dense_gather"]
    assert not any("flashhead" in sentence for sentence in summary_sentences(only))
    assert summary_sentences([]) == ["Nothing was measured."]


def test_disagreement_between_sizes_is_not_hidden(records: list[Record]) -> None:
    uneven = [
        dataclasses.replace(record, top1_agreement=0.9) if record.tp_size == 2 else record
        for record in records
    ]
    assert "on 90.00 % of 250 test states at its worst tp_size, 2" in summary_sentences(uneven)[-1]
