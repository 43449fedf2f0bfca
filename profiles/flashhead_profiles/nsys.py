"""The `.sqlite` that `nsys export --type sqlite` writes, read into the timeline.

Tables and columns as two documents of Nsight Systems have them: "SQLite Export Schema Reference" of
version 2021.5 (https://docs.nvidia.com/nsight-systems/2021.5/nsys-exporter/exported_data.html) and
the schema in the User Guide of 2024 (https://docs.nvidia.com/nsight-systems/UserGuide/), which puts
columns between the older ones:

    NVTX_EVENTS                   start, end, eventType, text, textId, globalTid, domainId,
                                  int64Value; eventType 59 push/pop, 60 start/end, 75 domain
    CUPTI_ACTIVITY_KIND_KERNEL    start, end, correlationId, shortName
    CUPTI_ACTIVITY_KIND_MEMCPY    start, end, correlationId
    CUPTI_ACTIVITY_KIND_RUNTIME   start, correlationId, globalTid
    StringIds                     id, value

The release notes of 2025.6 (https://docs.nvidia.com/nsight-systems/2025.6/ReleaseNotes/) announce
for the versions of 2026 that SQLite keeps its schema but rows come in any order, and that JSON is
laid out anew. So columns are read by their names and rows are sorted here; JSON is not read.

Times are nanoseconds. Tables are made as they are needed, so each may be missing, and columns that
only help are taken where they exist. The format is NVIDIA's to change: a table or column that is
missing is named. No report written by a real `nsys` was at hand to try this on.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pandas as pd

from flashhead_profiles.ranges import DOMAIN, NAMES, split_message
from flashhead_profiles.traces import Trace, TraceError, TraceRange, Work, rank_in_name, timeline

_PUSH_POP, _START_END, _DOMAIN_CREATE = 59, 60, 75
_MEMCPY = "CUPTI_ACTIVITY_KIND_MEMCPY"
_KERNEL = "CUPTI_ACTIVITY_KIND_KERNEL"
_RUNTIME = "CUPTI_ACTIVITY_KIND_RUNTIME"
_GRAPH = "CUPTI_ACTIVITY_KIND_GRAPH_TRACE"
_NVTX, _STRINGS = "NVTX_EVENTS", "StringIds"
_WORK_COLUMNS = ("kernels_us", "communication_us", "overlap_us")


def read_nsys(path: Path, rank: int | None = None) -> pd.DataFrame:
    """The timeline of one report.

    rank: where the file's name does not hold it as `rank0` or `rank_0`.

    Raises:
        TraceError: the file is no such database, or holds no range of ours.
    """
    return timeline(_nsys_trace(path, rank))


def _nsys_trace(path: Path, rank: int | None) -> Trace:
    if not path.is_file():
        raise TraceError(f"cannot read {path}: there is no such file")
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
            database.row_factory = sqlite3.Row
            tables = _Tables(path, database)
            ranges = _ranges(tables)
            work = _work(tables)
    except sqlite3.DatabaseError as error:
        raise TraceError(
            f"{path} is not an SQLite export of Nsight Systems ({error}): make one with "
            f"nsys export --type sqlite"
        ) from error
    if not ranges:
        raise TraceError(
            f"{path} holds none of this project's ranges: take the report with launch/profile.sh"
        )
    if rank is None:
        rank = rank_in_name(path)
    if rank is None:
        raise TraceError(f"the name of {path} does not hold its rank: name it like rank0.sqlite")
    if isinstance(work, str):
        return Trace(rank, ranges, [], dict.fromkeys(_WORK_COLUMNS, work))
    return Trace(rank, ranges, work)


class _Tables:
    """The tables of one report.

    Raises:
        TraceError: from each method, for what the report lacks, by its name.
    """

    def __init__(self, path: Path, database: sqlite3.Connection) -> None:
        self._path, self._database = path, database
        found = database.execute("SELECT name FROM sqlite_master WHERE type IN ('table', 'view')")
        self._names = {row[0] for row in found}

    def __contains__(self, table: str) -> bool:
        return table in self._names

    def rows(
        self, table: str, needed: Sequence[str], optional: Sequence[str] = ()
    ) -> list[sqlite3.Row]:
        """All rows, sorted by the columns in the order given; optional ones where they exist."""
        if table not in self._names:
            raise TraceError(
                f"{self._path} has no table {table}: run nsys with --trace=cuda,nvtx and export "
                f"the report with --type sqlite"
            )
        columns = {row["name"] for row in self._database.execute(f"PRAGMA table_info({table})")}
        if lacking := [name for name in needed if name not in columns]:
            raise TraceError(
                f"table {table} of {self._path} has no column {', '.join(lacking)}: this program "
                f"does not know the schema of that version of Nsight Systems"
            )
        names = ", ".join(f'"{name}"' for name in (*needed, *sorted(columns & set(optional))))
        return list(self._database.execute(f"SELECT {names} FROM {table} ORDER BY {names}"))

    def strings(self) -> dict[int, str]:
        """Texts by their number, which other tables hold."""
        return {row["id"]: row["value"] for row in self.rows(_STRINGS, ("id", "value"))}


def _ranges(tables: _Tables) -> list[TraceRange]:
    """Ours, in the order in which they began, an outer one before those inside it."""
    rows = [
        dict(row)
        for row in tables.rows(
            _NVTX,
            ("start", "end", "eventType", "globalTid"),
            ("text", "textId", "domainId", "int64Value"),
        )
    ]
    numbered = any(row.get("textId") is not None for row in rows)
    strings = tables.strings() if numbered else {}

    def text(row: dict[str, Any]) -> str:
        return row.get("text") or strings.get(row.get("textId", 0), "")

    created = [row for row in rows if row["eventType"] == _DOMAIN_CREATE and "domainId" in row]
    # A report without domain events cannot tell ours from others.
    domains = {row["domainId"] for row in created if text(row) == DOMAIN} if created else None
    found = []
    for row in rows:
        if row["eventType"] not in (_PUSH_POP, _START_END) or row["end"] is None:
            continue
        if domains is not None and row["domainId"] not in domains:
            continue
        try:
            name, label = split_message(text(row))
        except ValueError:
            continue
        span = (row["start"] / 1e3, row["end"] / 1e3)
        found.append(TraceRange(name, label, row.get("int64Value"), *span, row["globalTid"]))
    # Of two that begin and end in the same nanosecond, the name tells which one is outside.
    return sorted(found, key=lambda r: (r.start_us, -r.stop_us, NAMES.index(r.name)))


def _work(tables: _Tables) -> list[Work] | str:
    """Kernels and copies with the call that launched them; a graph's all with its launch.

    Returns:
        Why there are none, where the report does not hold them.
    """
    if missing := [table for table in (_KERNEL, _RUNTIME) if table not in tables]:
        why = "nothing ran on a GPU, or nsys did not trace cuda"
        if _KERNEL in missing and _GRAPH in tables:
            why = "CUDA graphs were traced whole: run nsys with --cuda-graph-trace=node"
        return f"the report has no table {', '.join(missing)}: {why}"
    strings = tables.strings()
    launches: dict[int, tuple[float, object]] = {}
    for row in tables.rows(_RUNTIME, ("start", "correlationId", "globalTid")):
        launches.setdefault(row["correlationId"], (row["start"] / 1e3, row["globalTid"]))
    found = []
    for row in tables.rows(_KERNEL, ("start", "end", "correlationId", "shortName")):
        if launch := launches.get(row["correlationId"]):
            name = strings.get(row["shortName"], "kernel")
            found.append(Work(name, row["start"] / 1e3, row["end"] / 1e3, *launch))
    if not found:
        return f"no kernel of the report has its launch in {_RUNTIME}"
    if _MEMCPY in tables:
        for row in tables.rows(_MEMCPY, ("start", "end", "correlationId")):
            if launch := launches.get(row["correlationId"]):
                found.append(Work("copy", row["start"] / 1e3, row["end"] / 1e3, *launch))
    return found
