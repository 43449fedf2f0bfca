"""The report's files: all of them or none, and never in the place of what is not a report."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from flashhead_dist.errors import UserError
from flashhead_dist.report.page import FRAME_NAMES, GENERATOR, Report, make_report
from flashhead_dist.report.runs import load_run
from flashhead_dist.report.serving_page import is_serving_run, serving_report

PAGE_NAME = "report.html"
REPORT_FOLDER = "report"


def check_output(folder: Path) -> None:
    """Refuse a folder that cannot be one of a report, before anything is computed.

    Raises:
        UserError: it is a file, or holds files that no report wrote.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"--output {folder} is a file: give a folder, new or of an earlier report")
    strangers = sorted(path.name for path in folder.iterdir() if not _is_of_report(path))
    if strangers:
        raise UserError(
            f"--output {folder} holds {strangers[0]}, which no report wrote: nothing is "
            f"overwritten there, so give a new folder"
        )


def write_output(report: Report, folder: Path) -> list[Path]:
    """Write page and CSV files beside the folder, then put them in its place; returns their paths.

    An earlier report there is replaced as a whole, so that no file of it is left among the new.

    Raises:
        UserError: see `check_output`, or the disk refuses; an earlier report is left as it was.
    """
    check_output(folder)
    fresh: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        names = [PAGE_NAME]
        (fresh / PAGE_NAME).write_text(report.html, encoding="utf-8")
        for stem, frame in report.frames.items():
            frame.to_csv(fresh / f"{stem}.csv", index=False)
            names.append(f"{stem}.csv")
        fresh.chmod(0o755)
        if folder.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
            folder.replace(old)
            fresh.replace(folder)
            shutil.rmtree(old)
        else:
            fresh.replace(folder)
    except OSError as error:
        if fresh is not None:
            shutil.rmtree(fresh, ignore_errors=True)
        raise UserError(
            f"cannot write the report to {folder} ({error.strerror or error}): free space or give "
            f"another folder with --output"
        ) from error
    return [folder / name for name in names]


def write_page(run_folder: Path) -> Path:
    """Write the report of one run to `report` within it, and return the page's path.

    Raises:
        UserError: see `load_run`, `serving_report` and `write_output`.
    """
    serving = is_serving_run(run_folder)
    report = serving_report(run_folder) if serving else make_report([load_run(run_folder)])
    return write_output(report, run_folder / REPORT_FOLDER)[0]


def _is_of_report(path: Path) -> bool:
    if path.suffix == ".csv" and path.stem in FRAME_NAMES:
        return (path.parent / PAGE_NAME).is_file()
    return path.name == PAGE_NAME and _is_report(path)


def _is_report(page: Path) -> bool:
    try:
        with page.open(encoding="utf-8") as file:
            start = file.read(2000)
    except (OSError, UnicodeDecodeError):
        return False
    return f'name="generator" content="{GENERATOR}"' in start
