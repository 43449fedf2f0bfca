"""A run over tasks: its folder with settings and records of items, and figures from the records.

Intervals are of 95 % (`evaluate.intervals`): of shares Wilson's, of the difference of two scores a
bootstrap of items, which keeps the two answers to an item together.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from flashhead_dist.errors import UserError
from flashhead_dist.evaluate.intervals import cluster_means, percentile_interval, wilson
from flashhead_dist.evaluate.tasks.base import Task

SETTINGS_NAME = "settings.json"
RECORDS_NAME = "records.jsonl"


class TaskRun:
    """Appends records, and knows those of earlier calls.

    A record: `task`, `item`, `prompts` (one a turn and head), `truth`, `batch` (a name, the same
    for all items decoded together) and `answers`, by the head's label: `texts`, `final`, `correct`,
    `num_tokens`, `finish_reasons`, `details`; the first differing token from the dense head's
    (`first_difference`, from 0 through all turns, None for the same text); and of the whole batch
    `batch_tokens`, `batch_s` (both without first tokens) and `batch_first_token_s`.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        """settings: what records must share to be put side by side; about: what else to note.

        Raises:
            UserError: the folder holds records made with other settings, or cannot be used.
        """
        self.folder = folder
        self.records: list[dict[str, Any]] = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / RECORDS_NAME
            if path.exists():
                self.records = _read_records(path)
            known = _read_settings(folder / SETTINGS_NAME)
            if self.records and known is not None:
                _refuse_others(folder, known, settings)
            else:
                document = {"settings": dict(settings), "about": dict(about)}
                text = json.dumps(document, indent=1) + "\n"
                (folder / SETTINGS_NAME).write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"{folder} cannot be used ({error.strerror}): name another with --out"
            ) from error
        self.finished = {(record["task"], record["item"]) for record in self.records}

    def append(self, records: Iterable[dict[str, Any]]) -> None:
        """Write records of finished items, all at once."""
        added = list(records)
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in added)
        with (self.folder / RECORDS_NAME).open("a", encoding="utf-8") as file:
            file.write(text)
        self.records += added
        self.finished |= {(record["task"], record["item"]) for record in added}


def _read_settings(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is no settings of a run over tasks: name another folder with --out"
        ) from error
    return found


def _refuse_others(folder: Path, known: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    # As JSON gives them back.
    asked = json.loads(json.dumps(dict(settings)))
    differ = [key for key in {**known, **asked} if known.get(key) != asked.get(key)]
    if differ:
        key = differ[0]
        raise UserError(
            f"{folder} holds records made with {key} {known.get(key)!r}, not {asked.get(key)!r}: "
            f"name another folder with --out"
        )


def _read_records(path: Path) -> list[dict[str, Any]]:
    """Records of whole lines; a last one that was cut short is taken out of the file."""
    text = path.read_text(encoding="utf-8")
    # Not splitlines: an answer may hold other characters that it takes for the end of a line.
    whole, _, rest = text.rpartition("\n")
    if rest:
        path.write_text(whole + "\n" if whole else "", encoding="utf-8")
    records = []
    for number, line in enumerate(filter(None, whole.split("\n")), start=1):
        try:
            record = json.loads(line)
            record["task"], record["item"], record["answers"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"line {number} of {path} is no record of an item: take it out, and it is decoded "
                f"again"
            ) from error
        records.append(record)
    return records


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
