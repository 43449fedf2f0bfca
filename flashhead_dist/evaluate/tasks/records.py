"""The folder of a run over tasks: what it was made with, and a record an item as it is finished."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from flashhead_dist.errors import UserError

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
