"""A run over tasks as tables and sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from flashhead_dist.evaluate.tasks import Task
from flashhead_dist.evaluate.tasks.records import share_with_interval


def task_tables(rows: Sequence[Mapping[str, Any]], tasks: Sequence[Task]) -> list[Table]:
    """What the answers are worth, and how alike and how fast they are; a line a task and head."""
    titles = {task.name: task for task in tasks}
    scores = Table(title="Scores, % (95 % interval)", title_justify="left")
    for name in ("task", "head", "items", "dense", "this head", "difference", "answers agree"):
        scores.add_column(name, justify="left" if name in ("task", "head") else "right")
    texts = Table(title="Texts and speed", title_justify="left")
    for name in ("task", "head", "same texts, %", "first difference", "dense tokens/s", "tokens/s"):
        texts.add_column(name, justify="left" if name in ("task", "head") else "right")
    for row in rows:
        title, head = titles[row["task"]].title, row["head"]
        agree = _interval(row, "answers_agree")
        agree = f"{agree} of {row['finals']}" if row["finals"] else agree
        scores.add_row(
            title,
            head,
            _items(row, titles[row["task"]]),
            _interval(row, "dense_score"),
            _interval(row, "score"),
            _interval(row, "score_difference", signed=True),
            agree,
        )
        texts.add_row(
            title,
            head,
            _interval(row, "identical_texts"),
            "-" if row["first_difference"] is None else f"{row['first_difference']:.0f}",
            *(_rate(row[name]) for name in ("dense_tokens_per_s", "tokens_per_s")),
        )
    return [scores, texts]


def task_notes(rows: Sequence[Mapping[str, Any]], tasks: Sequence[Task]) -> list[str]:
    """Sentences under the tables: what each column is, and what was left out."""
    notes = [
        "answers agree: of the items where either head gave a final answer, whose number stands "
        "after `of`. IFEval's final answer is which of its instructions were followed.",
        "first difference: median place of the first other token, from 0, over the texts that "
        "differ. tokens/s: of a whole batch after its first tokens, median over batches.",
    ]
    for head in dict.fromkeys(row["head"] for row in rows):
        own = [row for row in rows if row["head"] == head]
        if len(own) > 1:
            notes.append(_of_all(head, own))
    unscored = {
        row["task"]: row["items"] - row["scored"]
        for row in rows
        for task in tasks
        if task.name == row["task"] and task.scored
    }
    for name, count in unscored.items():
        if count:
            notes.append(
                f"{name}: {count} items have no score, since a rule needs nltk's punkt_tab, which "
                f"is not installed: python -m nltk.downloader punkt_tab"
            )
    return notes


def _of_all(head: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """All tasks together: shares of items, whatever their task."""
    said = []
    for name, total, what in (
        ("identical_texts", "items", "texts are the dense head's own"),
        ("answers_agree", "finals", "final answers agree"),
    ):
        count = sum(round(row[name] * row[total]) for row in rows if row[total])
        everything = sum(row[total] for row in rows)
        share, low, high = share_with_interval(count, everything)
        if everything:
            said.append(
                f"{count} of {everything} {what}, {100 * share:.1f} % "
                f"({100 * low:.1f}-{100 * high:.1f})"
            )
    return f"{head}, all tasks: {'; '.join(said)}."


def _items(row: Mapping[str, Any], task: Task) -> str:
    if not task.scored or row["scored"] == row["items"]:
        return str(row["items"])
    return f"{row['items']} ({row['scored']} scored)"


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _interval(row: Mapping[str, Any], name: str, *, signed: bool = False) -> str:
    value = row[name]
    if value is None:
        return "-"
    plus = "+" if signed else ""
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    between = " to " if signed else "-"
    return f"{100 * value:{plus}.1f} ({100 * low:{plus}.1f}{between}{100 * high:{plus}.1f})"
