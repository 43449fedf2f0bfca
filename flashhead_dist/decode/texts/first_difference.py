"""Where a head's greedy text first parts from the dense head's, from one pass over its states."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashhead_dist.decode.texts.dense import DenseTexts
from flashhead_dist.errors import UserError
from flashhead_dist.heads.base import Head, Want
from flashhead_dist.heads.emulated import EmulatedHead

_ROWS = 64


@dataclass(frozen=True)
class TextRecord:
    """One prompt and one head.

    key: of the head, its index and the texts: what makes a record fit for use in a later run.
    first_difference: number of the first token that differs, from 0; None where none does.
    agreeing: of all `num_tokens` states of the dense text, those from which the head chooses the
    dense token too. ends_at: number of the dense text's first stop token, after which it was
    decoded on; None where there is none.
    """

    key: str
    head: str
    prompt: int
    source: str
    num_tokens: int
    first_difference: int | None
    dense_token: int | None
    head_token: int | None
    agreeing: int
    ends_at: int | None


def compare_texts(
    head: Head | EmulatedHead,
    texts: DenseTexts,
    stop_token_ids: frozenset[int],
    *,
    key: str,
    label: str,
) -> list[TextRecord]:
    """A record for each text of the batch."""
    batch_size, length, hidden_size = texts.states.shape
    rows = texts.states.view(-1, hidden_size)
    chosen = torch.cat(
        [head.serve(part, Want()).token_ids[:, 0].cpu() for part in torch.split(rows, _ROWS)]
    ).view(batch_size, length)
    return [
        _record(row, texts, chosen[row], stop_token_ids, key, label) for row in range(batch_size)
    ]


def _record(
    row: int,
    texts: DenseTexts,
    chosen: Tensor,
    stop_token_ids: frozenset[int],
    key: str,
    label: str,
) -> TextRecord:
    dense = texts.token_ids[row]
    place = first_difference(dense, chosen)
    ends = [n for n, token in enumerate(dense.tolist()) if token in stop_token_ids]
    return TextRecord(
        key=key,
        head=label,
        prompt=texts.batch.first + row,
        source=texts.batch.prompts[row].source,
        num_tokens=len(dense),
        first_difference=place,
        dense_token=None if place is None else int(dense[place]),
        head_token=None if place is None else int(chosen[place]),
        agreeing=int((dense == chosen).sum()),
        ends_at=ends[0] if ends else None,
    )


def first_difference(left: Tensor, right: Tensor) -> int | None:
    """Place of the first token int64 `[T]` that differs, None where none does."""
    places = (left != right).nonzero()
    return int(places[0, 0]) if len(places) else None


def append_records(path: Path, records: list[TextRecord]) -> None:
    """Add records to a .jsonl file, one line each.

    Raises:
        UserError: the file cannot be written.
    """
    lines = "".join(json.dumps(asdict(record)) + "\n" for record in records)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(lines)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): name another") from error


def read_records(path: Path) -> list[TextRecord]:
    """The records of a file, none where it is not there; a last line cut short is left out.

    Raises:
        UserError: another line that is no record.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    names = {field.name for field in fields(TextRecord)}
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            item: Any = json.loads(line)
            if set(item) != names:
                raise ValueError
            records.append(TextRecord(**item))
        except (ValueError, TypeError) as error:
            if number == len(lines) and not line.endswith("\n"):
                break
            raise UserError(
                f"line {number} of {path} is no record of this command: name another --out, or "
                f"delete it"
            ) from error
    return records
