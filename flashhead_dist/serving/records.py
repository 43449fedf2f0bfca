"""The record of one call of the benchmark client, its file and its reader.

One line of JSON a record in `serving.jsonl`, on the disk before the next call begins.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from flashhead_dist.bench.records import cannot_write
from flashhead_dist.errors import UserError
from flashhead_dist.serving.client import Served

SERVING_NAME = "serving.jsonl"
SCHEMA_VERSION = 1
DENSE, FLASHHEAD = "dense", "flashhead"
HEADS = (DENSE, FLASHHEAD)


@dataclass(frozen=True, kw_only=True)
class ServingRecord(Served):
    """One head at one `tp_size` and concurrency, in one round.

    number: of the round, from 0. new_tokens: of every request. The rest says what it ran on.
    """

    schema_version: int
    time_utc: str
    head: str
    tp_size: int
    concurrency: int
    number: int
    num_requests: int
    new_tokens: int
    oversubscribed: bool

    system: str
    device: str
    dtype: str
    model: str
    model_hash: str
    index_hash: str
    versions: dict[str, str]
    commit: str


def append_record(record: ServingRecord, folder: Path) -> None:
    """Add a line to the run folder's file; raises UserError where the disk refuses."""
    path = folder / SERVING_NAME
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(record), ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise cannot_write(path, error) from error


def read_serving(folder: Path) -> list[ServingRecord]:
    """The records of a run folder, in the order of measurement.

    A last line without its newline is what a killed run left, and is passed over.

    Raises:
        UserError: no such file, or a line that is no record of this schema.
    """
    path = folder / SERVING_NAME
    try:
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    except OSError as error:
        raise UserError(
            f"cannot read {path} ({error.strerror or error}): give a run folder that "
            f"launch/serve_bench.py wrote"
        ) from error
    return [_record(line, number, path) for number, line in enumerate(lines, start=1)]


def _record(line: str, number: int, path: Path) -> ServingRecord:
    try:
        value: Any = json.loads(line)
        if value["schema_version"] != SCHEMA_VERSION:
            raise ValueError(
                f"its schema is {value['schema_version']}, of commit {value.get('commit')}, and "
                f"this reads {SCHEMA_VERSION}"
            )
        _check_keys(value)
        return ServingRecord(**value)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"line {number} of {path} is not a record ({error}): remove it or measure again"
        ) from error


def _check_keys(value: Mapping[str, Any]) -> None:
    known = {field.name for field in fields(ServingRecord)}
    if known != value.keys():
        raise ValueError(f"keys missing or unknown: {', '.join(sorted(known ^ value.keys()))}")
