"""The folder of one run: made before anything is measured, so that a bad one is refused early."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

from flashhead_dist.bench.records import cannot_write

ENVIRONMENT_NAME = "environment.json"
PIPELINE_NAME = "pipeline.json"
"""What launch/bench_pipeline.py leaves in the folder of a run, for its report."""


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
