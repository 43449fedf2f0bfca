"""Figures of a run over tasks, from its records: a row a task and head, with what is known of each.

Intervals are of 95 % (`evaluate.intervals`): of shares Wilson's, of the difference of two scores a
bootstrap of items, which keeps the two answers to an item together.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from flashhead_dist.evaluate.intervals import cluster_means, percentile_interval, wilson
from flashhead_dist.evaluate.tasks.task import Task


def summarise(records: Sequence[Mapping[str, Any]], tasks: Sequence[Task], dense: str) -> Any:
    """A DataFrame with a row for each task and head that was not `dense`, the dense head's label.

    Shares lie in 0..1, with `_low` and `_high` for the ends of an interval; NaN where there is
    nothing to divide by. `answers_agree`: of the items where either head gave a final answer.
    `first_difference`: median over the texts that differ. `*_tokens_per_s`: median over batches.
    """
    rows = []
    for task in tasks:
        own = [record for record in records if record["task"] == task.name]
        if own:
            rows += [_row(task, own, label, dense) for label in _labels(own) if label != dense]
    return pd.DataFrame(rows)


def share_with_interval(count: int, total: int) -> tuple[float, float, float]:
    """count / total with the ends of Wilson's interval; NaN for a total of 0."""
    if total == 0:
        return math.nan, math.nan, math.nan
    found = wilson(count, total)
    return found.value, found.low, found.high


def _labels(records: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(label for record in records for label in record["answers"]))


def _row(
    task: Task, records: Sequence[Mapping[str, Any]], label: str, dense: str
) -> dict[str, Any]:
    pairs = [
        (record["answers"][dense], record["answers"][label])
        for record in records
        if label in record["answers"]
    ]
    row: dict[str, Any] = {"task": task.name, "head": label, "items": len(pairs)}
    scored = [(a["correct"], b["correct"]) for a, b in pairs if a["correct"] is not None]
    scored = [(a, b) for a, b in scored if b is not None]
    row["scored"] = len(scored)
    _put(row, "dense_score", sum(a for a, _ in scored), len(scored))
    _put(row, "score", sum(b for _, b in scored), len(scored))
    row |= _difference(scored)
    finals = [(a["final"], b["final"]) for a, b in pairs]
    finals = [(a, b) for a, b in finals if a is not None or b is not None]
    row["finals"] = len(finals)
    _put(row, "answers_agree", sum(task.same_final(a, b) for a, b in finals), len(finals))
    differences = [b["first_difference"] for _, b in pairs if b["first_difference"] is not None]
    _put(row, "identical_texts", len(pairs) - len(differences), len(pairs))
    row["first_difference"] = float(np.median(differences)) if differences else math.nan
    row["tokens"] = sum(b["num_tokens"] for _, b in pairs)
    row["dense_tokens_per_s"] = _tokens_per_s(records, dense)
    row["tokens_per_s"] = _tokens_per_s(records, label)
    return row


def _put(row: dict[str, Any], name: str, count: int, total: int) -> None:
    row[name], row[f"{name}_low"], row[f"{name}_high"] = share_with_interval(count, total)


def _difference(scored: Sequence[tuple[bool, bool]]) -> dict[str, float]:
    """The head's score less the dense head's, and its interval."""
    names = ("score_difference", "score_difference_low", "score_difference_high")
    if len(scored) < 2:
        return dict.fromkeys(names, math.nan)
    changes = np.array([float(b) - float(a) for a, b in scored])
    if not changes.any():
        # Nothing to resample; how many more items could have changed is Wilson's to say.
        most = wilson(0, len(changes)).high
        return dict(zip(names, (0.0, -most, most), strict=True))
    number = np.arange(len(changes))
    means = cluster_means(changes[:, None], number, np.zeros_like(number))[:, 0]
    found = percentile_interval(float(changes.mean()), means)
    return dict(zip(names, (found.value, found.low, found.high), strict=True))


def _tokens_per_s(records: Iterable[Mapping[str, Any]], label: str) -> float:
    """Median over batches, of all sequences together, first tokens left out."""
    batches = {
        record["batch"]: record["answers"][label]
        for record in records
        if label in record["answers"]
    }
    rates = [one["batch_tokens"] / one["batch_s"] for one in batches.values() if one["batch_s"] > 0]
    return float(np.median(rates)) if rates else math.nan
