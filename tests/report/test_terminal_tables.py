"""Tables and sentences of a run over tasks."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from flashhead_dist.evaluate.tasks import find_tasks
from flashhead_dist.report.tasks import task_notes, task_tables


def row(task: str, **more: Any) -> dict[str, Any]:
    names = ("dense_score", "score", "answers_agree", "identical_texts")
    shares = {f"{name}{end}": 0.5 for name in names for end in ("", "_low", "_high")}
    found = {"task": task, "head": "flashhead", "items": 10, "scored": 10, "finals": 8}
    found |= {f"score_difference{end}": -0.1 for end in ("", "_low", "_high")}
    times = {"first_difference": 42.0, "dense_tokens_per_s": 10.0, "tokens_per_s": None}
    return found | shares | times | more


def test_figures_stand_with_their_intervals_and_nothing_is_made_up() -> None:
    tasks = find_tasks("gsm8k,mt_bench")
    unscored = {
        name: None
        for name in row("mt_bench")
        if name.startswith(("score", "dense_score", "answers"))
    }
    rows = [
        row("gsm8k", score=0.2, score_low=0.1, score_high=0.4),
        row("mt_bench", **unscored | {"scored": 0, "finals": 0, "first_difference": None}),
    ]
    console = Console(width=140, record=True)
    for table in task_tables(rows, tasks):
        console.print(table)
    text = console.export_text()
    assert "20.0 (10.0-40.0)" in text
    assert "-10.0 (-10.0 to -10.0)" in text
    assert "50.0 (50.0-50.0) of 8" in text
    (bench,) = (line for line in text.splitlines() if "MT-Bench" in line and "10 " in line)
    # No judge, so no score, no difference and no agreement.
    assert [cell.strip() for cell in bench.split("│")[3:-1]] == ["10", "-", "-", "-", "-"]


def test_all_tasks_are_counted_by_items_and_unscored_ones_named() -> None:
    rows = [row("gsm8k", identical_texts=1.0), row("ifeval", items=30, scored=24, finals=24)]
    notes = task_notes(rows, find_tasks("gsm8k,ifeval"))
    (pooled,) = (note for note in notes if "all tasks" in note)
    assert "25 of 40 texts are the dense head's own, 62.5 %" in pooled
    assert "16 of 32 final answers agree, 50.0 %" in pooled
    (missing,) = (note for note in notes if "no score" in note)
    assert missing.startswith("ifeval: 6 items")
