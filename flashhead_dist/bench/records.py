"""The record of one measurement, the folder of a run, and their reader.

`docs/concepts/measurement.md` explains every key.

A run appends one line of JSON a record to `records.jsonl` and flushes it to the disk, so whatever
ends the run leaves every earlier record readable.
"""

from __future__ import annotations

import json
import os
from dataclasses import MISSING, asdict, dataclass, fields
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from flashhead_dist.bench.split import StepSplit
from flashhead_dist.bench.wire import DeviceCount
from flashhead_dist.errors import UserError

SCHEMA_VERSION = 2
RECORDS_NAME = "records.jsonl"
ENVIRONMENT_NAME = "environment.json"
PIPELINE_NAME = "pipeline.json"
"""What launch/bench_pipeline.py leaves in the folder of a run, for its report."""


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where a record comes from; part of every record."""

    schema_version: int
    time_utc: str
    system: str
    device: str
    os: str
    backend: str
    dtype: str
    threads_per_rank: int
    world_size: int
    versions: dict[str, str]
    commit: str
    model: str
    model_hash: str
    synthetic: bool
    index_hash: str | None
    num_probes: int | None
    alpha: float | None
    escalate_below: float | None = None
    """Of flashhead_escalate, in logits; None for the index's own, and in records of before it."""
    seed: int


@dataclass(frozen=True, kw_only=True)
class Record(Provenance):
    """One head at one `tp_size` and batch size."""

    head: str
    tp_size: int
    batch_size: int

    measured: bool
    """False: `median_us` is a projection, see `projection`."""
    oversubscribed: bool
    oversubscription: str

    median_us: float | None
    p10_us: float | None
    p90_us: float | None
    compute_us: float
    compute_us_by_rank: list[float]
    communication_us: float | None
    num_iterations: int
    projection: str | None

    wall_median_us: float
    wall_p10_us: float
    wall_p90_us: float

    split: StepSplit
    """Where the time goes: centroids, candidates, exchange, waiting; and a slow rank's number."""

    num_collectives: int
    payload_bytes_per_row: float
    sent_bytes_per_row: float
    counted_bytes_per_row: float | None
    counted_bytes_per_row_least: float | None
    counted_bytes_per_row_greatest: float | None
    counted_reason: str | None
    protocol_bytes_per_row: float | None
    device_counts: list[DeviceCount]
    device_counts_reason: str | None

    weight_bytes_per_rank: int
    total_weight_bytes: int
    weight_bytes_by_rank: list[int]
    peak_bytes_per_rank: int | None
    peak_bytes_by_rank: list[int | None]
    peak_reason: str | None
    workspace_bytes_per_rank: int | None = None
    """Of a step at this batch size, on CUDA; None on a CPU, and in records of before it."""

    read_bytes_by_rank: list[int]
    memory_bandwidth_bytes_per_s_by_rank: list[float]
    memory_bandwidth_method: str
    roofline_share: float

    top1_agreement: float | None
    top1_agreement_worst_source: float | None
    worst_source: str | None
    num_worst_source_states: int | None
    num_agreement_states: int

    speedup_over_dense_local_max: float | None
    scaling_efficiency: float | None

    def __post_init__(self) -> None:
        if self.measured and self.projection is not None:
            raise ValueError("a measured record has no projection")
        if not self.measured and self.projection is None:
            raise ValueError("a record that is not measured says how it was projected")

    def as_json_line(self) -> str:
        """One line of JSON without its newline."""
        return json.dumps(asdict(self), allow_nan=False)


class SchemaError(ValueError):
    """A record of another schema; the text says what to do about it."""

    def __init__(self, version: object, commit: object) -> None:
        older = isinstance(version, int) and version < SCHEMA_VERSION
        remedy = (
            f"measure again, or read it with the version of this program that wrote it (commit "
            f"{commit})"
            if older
            else "update this program"
        )
        super().__init__(
            f"its schema_version is {version} and this program reads {SCHEMA_VERSION}: {remedy}"
        )


def record_from_json(value: dict[str, Any]) -> Record:
    """Build a record from a decoded line.

    Raises:
        SchemaError: another schema version.
        ValueError: keys missing or unknown. TypeError, KeyError: a nested value without its form.
    """
    version = value.get("schema_version")
    if version != SCHEMA_VERSION:
        raise SchemaError(version, value.get("commit"))
    known = {field.name for field in fields(Record)}
    needed = {field.name for field in fields(Record) if field.default is MISSING}
    if missing := sorted(needed - value.keys()):
        raise ValueError(f"it lacks {', '.join(missing)}")
    if unknown := sorted(value.keys() - known):
        raise ValueError(f"it has the unknown keys {', '.join(unknown)}")
    counts = [DeviceCount(**count) for count in value["device_counts"]]
    return Record(**value | {"split": StepSplit.from_json(value["split"]), "device_counts": counts})


class RecordWriter:
    """Appends records to a file; a context manager.

    Raises:
        UserError: from the constructor and `write`, where the file system refuses.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_written = 0
        try:
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise cannot_write(path, error) from error

    def write(self, record: Record) -> None:
        """Append one line and wait until the disk has it."""
        try:
            self._file.write(record.as_json_line() + "\n")
            self._file.flush()
            # Without it a full disk behind a network or a delayed allocation shows only later.
            if self.path.is_file():
                os.fsync(self._file.fileno())
        except OSError as error:
            raise cannot_write(self.path, error) from error
        self.num_written += 1

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self._file.close()
        except OSError as close_error:
            # A failed write leaves its text in the buffer, and closing tries again.
            if error is None:
                raise cannot_write(self.path, close_error) from close_error


def cannot_write(path: Path, error: OSError) -> UserError:
    """The error of a run folder that refuses a file."""
    return UserError(
        f"cannot write {path} ({error.strerror or error}): free space or make it writable, "
        f"or choose another folder with --runs-dir"
    )


def read_records(path: Path) -> list[Record]:
    """Read a `records.jsonl`, or that of a run folder.

    A last line without its newline, left by a killed run, is not a record and is passed over.

    Raises:
        UserError: no such file, or a line that is no record of this schema.
    """
    file = path / RECORDS_NAME if path.is_dir() else path
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"cannot read {file} ({error.strerror or error}): give a run folder or its "
            f"{RECORDS_NAME}"
        ) from error
    records: list[Record] = []
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        try:
            records.append(record_from_json(json.loads(line)))
        except SchemaError as error:
            raise UserError(f"line {number} of {file} cannot be read: {error}") from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f"line {number} of {file} is not a record: {error}; remove it or measure again"
            ) from error
    return records


def make_run_folder(
    runs_dir: Path, host_class: str, commit: str, environment: dict[str, Any], now: datetime
) -> Path:
    """Make `runs_dir/<date>_<host class>_<commit>/` with its `environment.json`, and return it.

    The date carries the time of day, and a number where two runs start within a second.

    Raises:
        UserError: the folder or the file cannot be written.
    """
    stem = f"{now:%Y-%m-%dT%H-%M-%S}_{host_class}_{commit}"
    folder = runs_dir / stem
    try:
        runs_dir.mkdir(parents=True, exist_ok=True)
        number = 1
        while folder.exists():
            number += 1
            folder = runs_dir / f"{stem}_{number}"
        folder.mkdir()
    except OSError as error:
        raise cannot_write(folder, error) from error
    write_environment(folder, environment)
    return folder


def write_environment(folder: Path, environment: dict[str, Any]) -> None:
    """Write `environment.json`, in the place of an earlier one; raises UserError on failure."""
    _write(folder / ENVIRONMENT_NAME, environment)


def write_pipeline(folder: Path, document: dict[str, Any]) -> None:
    """Write `pipeline.json`, in the place of an earlier one; raises UserError on failure."""
    _write(folder / PIPELINE_NAME, document)


def _write(path: Path, value: dict[str, Any]) -> None:
    try:
        path.write_text(json.dumps(value, indent=2) + "\n")
    except OSError as error:
        raise cannot_write(path, error) from error
