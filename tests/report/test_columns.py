"""A column is declared once, and every table and file that has its key shows it."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

from flashhead_dist.report import columns
from flashhead_dist.report.columns import COLUMNS, Column, column_of, glossary, wilson_interval
from flashhead_dist.report.tables import by_kind, run_tables
from tests.report.run_folders import golden, run_of

GLOSSARY = Path(__file__).parents[2] / "docs" / "reference" / "columns.md"


def test_one_declaration_adds_a_column_to_terminal_csv_page_and_glossary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    from flashhead_dist.report.page import make_report

    new = Column(
        "compute_ms", "fresh heading", "ms", ".3f", "Compute in ms.", ("latency", "summary"),
        lambda frame: frame["compute_us"] / 1000
    )  # fmt: skip
    monkeypatch.setitem(COLUMNS, new.key, new)
    records = [r for r in golden() if r.tp_size < 8]
    report = make_report([run_of(tmp_path / "run", records)])
    assert (report.frames["latency"]["compute_ms"] > 0).all()
    assert "fresh heading ms" in report.html
    console = Console(width=200, record=True, file=StringIO())
    for table in run_tables(records):
        console.print(table)
    assert "fresh heading ms" in console.export_text()
    assert "| `compute_ms` | fresh heading ms | latency, summary | Compute in ms. |" in glossary()
    assert "compute_ms" in columns.table_keys("summary")


def test_the_glossary_in_docs_is_the_declarations() -> None:
    assert GLOSSARY.read_text(encoding="utf-8") == glossary()


def test_every_column_has_a_meaning_of_one_sentence() -> None:
    for column in COLUMNS.values():
        assert column.meaning.endswith("."), column.key
        assert "\n" not in column.meaning


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("median_us", 1234.5, "1,234"),
        ("measured_median_us", 7.25, "7.2"),
        ("roofline_share", 0.625, "62"),
        ("weight_bytes_per_rank", 2_500_000, "2.5"),
        ("read_bytes_per_s", 1.5e9, "1.5"),
        ("tp_size", 2.0, "2"),
        ("head", "flashhead", "flashhead"),
        ("median_us", None, "–"),
        ("median_us", float("nan"), "–"),
        ("a_key_of_nobody", 3, "3"),
    ],
)
def test_a_cell_is_written_in_its_columns_unit(key: str, value: object, text: str) -> None:
    assert column_of(key).write(value) == text


def test_measured_and_projected_rows_are_tables_of_their_own() -> None:
    frame = pd.DataFrame(
        {
            "head": ["a", "b", "c"],
            "measured_median_us": [1.0, None, None],
            "projected_median_us": [None, 2.0, None],
        }
    )
    (measured_title, measured), (projected_title, projected) = by_kind(frame)
    assert (measured_title, projected_title) == ("Measured", "PROJECTED, not measured")
    assert measured.to_dict("list") == {"head": ["a"], "measured_median_us": [1.0]}
    assert projected["head"].tolist() == ["b", "c"]
    assert "measured_median_us" not in projected


def test_changes_beyond_the_noise_are_a_table_of_their_own() -> None:
    verdicts = ["same", "worse", "within noise", "better"]
    frame = pd.DataFrame({"head": list("abcd"), "verdict": verdicts})
    (_, marked), (_, every) = by_kind(frame)
    assert marked["head"].tolist() == ["b", "d"]
    assert len(every) == 4
    assert len(by_kind(frame[frame.verdict == "same"])) == 1


def test_wilson_interval_is_that_of_the_literature() -> None:
    """Newcombe, Stat. Med. 17 (1998) 857, table I, method 3: 81 of 263, and 0 of 20."""
    assert wilson_interval(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
