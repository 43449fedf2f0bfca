"""Run folders as the report reads them: records, their frame, environment, and warnings.

Everything that can be wrong with a run folder is found here, before anything is written.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from flashhead_dist.bench.records import (
    ENVIRONMENT_NAME,
    PIPELINE_NAME,
    RECORDS_NAME,
    Record,
    cannot_write,
    read_records,
)
from flashhead_dist.bench.split import COMPUTE_PARTS
from flashhead_dist.errors import UserError
from flashhead_dist.report.columns import COLUMNS, KINDS, table_keys

SUMMARY_NAME = "summary.csv"

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# What all records of one run share.
_SHARED = ("system", "device", "model_hash", "dtype", "commit", "index_hash", "threads_per_rank")


@dataclass(frozen=True)
class RunFolder:
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

    @cached_property
    def frame(self) -> pd.DataFrame:
        """`records_frame` of the run."""
        return records_frame(self.records)


def records_frame(records: Sequence[Record]) -> pd.DataFrame:
    """One row a record, by batch size, `tp_size` and the order of heads: fields and columns.

    Besides the fields of `Record` it has every column of `COLUMNS` that is computed from them, and
    `measured_KEY` and `projected_KEY` of those that are either.
    """
    frame = pd.DataFrame([{f.name: getattr(r, f.name) for f in fields(Record)} for r in records])
    longest = [int(np.argmax(record.compute_us_by_rank)) for record in records]
    for key, by_rank in (
        ("compute_of_rank_us", "compute_us_by_rank"),
        ("read_bytes", "read_bytes_by_rank"),
        ("memory_bandwidth_bytes_per_s", "memory_bandwidth_bytes_per_s_by_rank"),
    ):
        values = frame[by_rank]
        frame[key] = [of_ranks[rank] for of_ranks, rank in zip(values, longest, strict=True)]
    for part in ("step", *COMPUTE_PARTS, "exchange", "waiting"):
        found = [record.split.step_us[part] for record in records]
        frame[f"{part}_us"] = [part_us and part_us.median for part_us in found]
        if part == "exchange":
            for end in ("p10", "p90"):
                frame[f"exchange_{end}_us"] = [us and getattr(us, end) for us in found]
    numbers = [key for key, column in COLUMNS.items() if column.format and key in frame]
    frame[numbers] = frame[numbers].apply(pd.to_numeric)
    for key, column in COLUMNS.items():
        if column.value is not None:
            frame[key] = column.value(frame)
        if column.by_kind:
            for kind in KINDS:
                known = frame["measured"] == (kind == "measured")
                frame[f"{kind}_{key}"] = frame[key].where(known)
    heads = list(dict.fromkeys(frame["head"]))
    order = frame["head"].map(heads.index)
    return (
        frame.assign(order=order)
        .sort_values(["batch_size", "tp_size", "order"], kind="stable")
        .drop(columns="order")
        .reset_index(drop=True)
    )


def table_frame(frame: pd.DataFrame, table: str) -> pd.DataFrame:
    """The columns of a table of records; without those that hold nothing."""
    return frame[table_keys(table)].dropna(axis="columns", how="all").reset_index(drop=True)


def write_summary(records: Sequence[Record], folder: Path) -> Path:
    """Write `summary.csv` into the run folder; raises UserError where that fails."""
    path = folder / SUMMARY_NAME
    try:
        records_frame(records)[table_keys("summary")].to_csv(path, index=False)
    except OSError as error:
        raise cannot_write(path, error) from error
    return path


def setting_frame(runs: Sequence[RunFolder]) -> pd.DataFrame:
    """What was measured on what: a row a fact, a column a run; `differs` where runs differ."""
    frame = pd.DataFrame({run.letter: _facts(run) for run in runs}).fillna("")
    frame["differs"] = frame.nunique(axis="columns") > 1
    return frame.rename_axis("fact").reset_index()


def warnings_of(run: RunFolder) -> list[str]:
    """What a reader must know first: synthetic models, ranks that share cores, missing cells."""
    return [*run.flaws, *record_warnings(run.records)]


def record_warnings(records: Sequence[Record]) -> list[str]:
    """Of any records of one run: see `warnings_of`."""
    first, warnings = records[0], []
    if first.synthetic:
        warnings.append(f"The model is SYNTHETIC ({first.model}): no claim about fidelity.")
    over = {r.tp_size: r.oversubscription for r in records if r.oversubscribed}
    if over:
        warnings.append(
            f"OVERSUBSCRIBED at tp {', '.join(map(str, sorted(over)))} ({over[max(over)]}): "
            f"latencies there are PROJECTED from the isolated compute of each rank and a model of "
            f"communication."
        )
    if first.commit.endswith("-dirty"):
        warnings.append(f"Commit {first.commit}: the code had uncommitted changes.")
    return warnings


def _facts(run: RunFolder) -> dict[str, str]:
    first, last = run.first, run.records[-1]
    iterations = sorted({record.num_iterations for record in run.records})
    return {
        "run": run.folder.resolve().name,
        "measured": f"{first.time_utc[:16].replace('T', ' ')} to {last.time_utc[11:16]} UTC",
        "system": f"{first.system}: {first.device}",
        "OS": first.os,
        "ranks": f"up to {max(run.tp_sizes)} of {first.world_size} started, "
        f"{first.threads_per_rank} thread{'' if first.threads_per_rank == 1 else 's'} each",
        "backend": first.backend,
        "model": f"{first.model}{' (SYNTHETIC)' if first.synthetic else ''}, {first.dtype}",
        "weights": first.model_hash[:12],
        "index": first.index_hash[:12] if first.index_hash else "none",
        "probes": "the index's own" if first.num_probes is None else str(first.num_probes),
        "escalation": "the index's own"
        if first.escalate_below is None
        else f"margins below {first.escalate_below:g} logits",
        "commit": first.commit,
        "batch sizes": ", ".join(map(str, run.batch_sizes)),
        "tp sizes": ", ".join(map(str, run.tp_sizes)),
        "iterations": str(iterations[0])
        if len(iterations) == 1
        else f"{iterations[0]} to {iterations[-1]} a head and cell",
        "software": ", ".join(f"{name} {number}" for name, number in first.versions.items()),
    }


def load_runs(paths: Sequence[Path]) -> list[RunFolder]:
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
        real = folder_of(path).resolve()
        if real in seen:
            raise UserError(f"{path} is the same run as {seen[real]}: give each run once")
        seen[real] = path
    return [load_run(path, letter) for path, letter in zip(paths, _LETTERS, strict=False)]


def load_run(path: Path, letter: str = "A") -> RunFolder:
    """Read one run folder, or that of a `records.jsonl`; raises UserError, see `load_runs`."""
    folder = folder_of(path)
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
    return RunFolder(
        letter=letter,
        folder=folder,
        records=tuple(records),
        environment=environment or {},
        pipeline=_read_json(folder / PIPELINE_NAME),
        flaws=tuple(flaws),
    )


def folder_of(path: Path) -> Path:
    """The run folder, of which a user may give the records' file."""
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
