"""Runs as the report reads them: records, environment, and what tells one run from another.

Everything that can be wrong with a run folder is found here, before anything is written.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashhead_dist.bench.records import (
    ENVIRONMENT_NAME,
    PIPELINE_NAME,
    RECORDS_NAME,
    Record,
    read_records,
)
from flashhead_dist.errors import UserError

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# What all records of one run share.
_SHARED = ("system", "device", "model_hash", "dtype", "commit", "index_hash", "threads_per_rank")


@dataclass(frozen=True)
class Run:
    """One run folder.

    letter: A for the first given, which others are compared with. environment: `environment.json`,
    empty where there is none. pipeline: what `bench_pipeline.py --run-dir` left, or None. flaws:
    sentences on what the folder lacks, such as cells that were planned and never measured.
    """

    letter: str
    folder: Path
    records: tuple[Record, ...]
    environment: Mapping[str, Any]
    pipeline: Mapping[str, Any] | None
    flaws: tuple[str, ...]

    @property
    def first(self) -> Record:
        """Any record, for what all of them share."""
        return self.records[0]

    @property
    def label(self) -> str:
        """`A: 2026-11-21 17:35, cpu-2c, a98c8461f1`."""
        when = self.first.time_utc[:16].replace("T", " ")
        return f"{self.letter}: {when}, {self.first.system}, {self.first.commit}"

    @property
    def batch_sizes(self) -> list[int]:
        """Ascending."""
        return sorted({record.batch_size for record in self.records})

    @property
    def tp_sizes(self) -> list[int]:
        """Ascending."""
        return sorted({record.tp_size for record in self.records})

    @property
    def heads(self) -> list[str]:
        """In the order of measurement."""
        return list(dict.fromkeys(record.head for record in self.records))

    def find(self, head: str, tp_size: int, batch_size: int) -> Record | None:
        """The record of a cell, or None."""
        key = (head, tp_size, batch_size)
        for record in self.records:
            if (record.head, record.tp_size, record.batch_size) == key:
                return record
        return None


def load_runs(paths: Sequence[Path]) -> list[Run]:
    """Read run folders in the order given, the first of which is the baseline.

    Raises:
        UserError: a folder that is missing, damaged, empty, of another schema or given twice.
    """
    if len(paths) > len(_LETTERS):
        raise UserError(
            f"{len(paths)} runs are too many for one page: give {len(_LETTERS)} at most"
        )
    seen: dict[Path, Path] = {}
    for path in paths:
        real = _folder(path).resolve()
        if real in seen:
            raise UserError(f"{path} is the same run as {seen[real]}: give each run once")
        seen[real] = path
    return [load_run(path, letter) for path, letter in zip(paths, _LETTERS, strict=False)]


def load_run(path: Path, letter: str = "A") -> Run:
    """Read one run folder, or that of a `records.jsonl`; raises UserError, see `load_runs`."""
    folder = _folder(path)
    if not path.exists():
        raise UserError(f"there is no run at {path}: give a folder that launch/scale.py wrote")
    if not (folder / RECORDS_NAME).is_file():
        raise UserError(
            f"{folder} is no run folder, as it holds no {RECORDS_NAME}: give one that "
            f"launch/scale.py wrote"
        )
    records = read_records(folder)
    if not records:
        raise UserError(
            f"{folder / RECORDS_NAME} holds no record, as its run ended before the first was "
            f"measured: run launch/scale.py again"
        )
    _check_one_run(folder, records)
    environment = _read_json(folder / ENVIRONMENT_NAME)
    flaws = _flaws(folder, records, environment)
    return Run(
        letter=letter,
        folder=folder,
        records=tuple(records),
        environment=environment or {},
        pipeline=_read_json(folder / PIPELINE_NAME),
        flaws=tuple(flaws),
    )


def _folder(path: Path) -> Path:
    return path.parent if path.name == RECORDS_NAME else path


def _check_one_run(folder: Path, records: Sequence[Record]) -> None:
    file = folder / RECORDS_NAME
    cells = Counter((r.head, r.tp_size, r.batch_size) for r in records)
    (head, tp_size, batch_size), count = cells.most_common(1)[0]
    if count > 1:
        raise UserError(
            f"{file} holds {count} records of {head} at tp {tp_size} and batch {batch_size}: "
            f"runs were appended to each other, so keep one record a cell"
        )
    for name in _SHARED:
        values = {getattr(record, name) for record in records}
        if len(values) > 1:
            shown = ", ".join(sorted(map(str, values)))
            raise UserError(
                f"{file} mixes runs, as its records differ in {name} ({shown}): give each run a "
                f"folder of its own"
            )


def _read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file of the run folder; None where there is no such file."""
    if not path.exists():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read {path} ({error}): restore it, or remove it and go without what it says"
        ) from error
    if not isinstance(value, dict):
        raise UserError(
            f"{path} holds no JSON object: restore it, or remove it and go without what it says"
        )
    return value


def _flaws(
    folder: Path, records: Sequence[Record], environment: Mapping[str, Any] | None
) -> list[str]:
    flaws = []
    if not (folder / RECORDS_NAME).read_bytes().endswith(b"\n"):
        flaws.append(f"The last line of {RECORDS_NAME} was cut off and is left out.")
    if environment is None:
        return [*flaws, f"The folder holds no {ENVIRONMENT_NAME}: what it would say is missing."]
    planned = _planned_cells(environment)
    missing = planned - {(r.head, r.tp_size, r.batch_size) for r in records}
    if missing:
        sizes = sorted({(tp_size, batch_size) for _, tp_size, batch_size in missing})
        where = ", ".join(f"tp {tp_size} batch {batch_size}" for tp_size, batch_size in sizes)
        flaws.append(
            f"INCOMPLETE: {len(missing)} of {len(planned)} planned figures were never measured "
            f"({where}); the run ended before its time."
        )
    return flaws


def _planned_cells(environment: Mapping[str, Any]) -> set[tuple[str, int, int]]:
    try:
        arguments = environment["arguments"]
        sizes, batches = (json.loads(arguments[key]) for key in ("tp_sizes", "batch_sizes"))
        heads = environment["heads"]
        return {(head, int(tp), int(batch)) for head in heads for tp in sizes for batch in batches}
    except (KeyError, TypeError, ValueError):
        return set()
