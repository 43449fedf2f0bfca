"""A run of launch/serve_bench.py as a table, as sentences, and as one JSON document."""

from __future__ import annotations

import json
from typing import Any

import pandas as pd
from rich.table import Table

from flashhead_dist.serving.bench import DENSE, FLASHHEAD

_UNKNOWN = "-"


def serving_table(summary: pd.DataFrame) -> Table:
    """A line a `tp_size`, concurrency and head; see `flashhead_dist.serving.records`."""
    table = Table(title="vLLM's server by head: measured", title_justify="left")
    for name in ("tp", "concurrency", "head"):
        table.add_column(name, justify="left" if name == "head" else "right")
    for name in (
        "tokens/s", "p10", "p90", "x dense", "TTFT ms p50", "p99", "TPOT ms p50", "p99",
        "same texts %", "same start %",
    ):  # fmt: skip
        table.add_column(name, justify="right")
    for row in _rows(summary):
        table.add_row(
            str(row["tp_size"]),
            str(row["concurrency"]),
            row["head"],
            *(f"{row[f'tokens_per_s{end}']:.1f}" for end in ("", "_p10", "_p90")),
            _UNKNOWN if row["over_dense"] is None else f"{row['over_dense']:.2f}",
            *(f"{row[f'ttft_{p}_ms']:,.0f}" for p in ("p50", "p99")),
            *(f"{row[f'tpot_{p}_ms']:,.1f}" for p in ("p50", "p99")),
            _percent(row["identical_texts"]),
            _percent(row["same_start"]),
            end_section=row["head"] == FLASHHEAD,
        )
    return table


def serving_notes(summary: pd.DataFrame) -> list[str]:
    """Sentences under the table: what the columns are, and what greedy texts are worth."""
    notes = [
        "tokens/s: median over rounds, with p10 and p90; TTFT and TPOT: vLLM's benchmark client's, "
        "p50 and p99 over requests, median over rounds. Heads took turns, the other server frozen.",
        "same texts: share of requests whose text is the dense server's of the same round; same "
        "start: mean share of that text before the first difference.",
    ]
    for row in _rows(summary):
        where = f"tp {row['tp_size']}, concurrency {row['concurrency']}"
        if row["head"] == DENSE and row["dense_repeats"] is not None:
            notes.append(
                f"{where}: {100 * row['dense_repeats']:.0f} % of the dense server's own texts were "
                f"those of its first call at the lowest concurrency."
            )
        if row["head"] == FLASHHEAD and row["flashhead_steps"] not in (None, 1.0):
            share = f"{100 * row['flashhead_steps']:.1f}"
            notes.append(f"{where}: FlashHead took {share} % of the steps, the dense path others.")
    return notes


def serving_words(summary: pd.DataFrame) -> list[str]:
    """One sentence a cell, the lowest `tp_size` and concurrency first."""
    words = []
    for row in _rows(summary):
        if row["head"] != FLASHHEAD or row["over_dense"] is None:
            continue
        dense = row["tokens_per_s"] / row["over_dense"]
        words.append(
            f"tp {row['tp_size']}, concurrency {row['concurrency']}: {row['tokens_per_s']:.1f} "
            f"tokens a second where the dense head gives {dense:.1f}, {row['over_dense']:.2f} "
            f"times as many; {_percent(row['identical_texts'])} % of the greedy texts are the same."
        )
    return words


def serving_document(summary: pd.DataFrame) -> list[dict[str, Any]]:
    """What --json prints: the summary's rows; None for no figure."""
    found: list[dict[str, Any]] = json.loads(summary.to_json(orient="records"))
    return found


def _rows(summary: pd.DataFrame) -> list[dict[str, Any]]:
    return serving_document(summary)


def _percent(share: float | None) -> str:
    return _UNKNOWN if share is None else f"{100 * share:.0f}"
