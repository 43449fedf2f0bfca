"""The `.sqlite` that `nsys export --type sqlite` writes, read into the timeline.

Tables and columns as "SQLite Export Schema Reference" of Nsight Systems 2021.5 documents them
(https://docs.nvidia.com/nsight-systems/2021.5/nsys-exporter/exported_data.html):

    NVTX_EVENTS                   start, end, eventType, text, textId, globalTid, domainId,
                                  int64Value; eventType 59 push/pop, 60 start/end, 75 domain
    CUPTI_ACTIVITY_KIND_KERNEL    start, end, correlationId, shortName
    CUPTI_ACTIVITY_KIND_MEMCPY    start, end, correlationId
    CUPTI_ACTIVITY_KIND_RUNTIME   start, end, correlationId, globalTid
    StringIds                     id, value

Times are nanoseconds. Tables are made as they are needed, so each may be missing, and columns that
only help are taken where they exist. The format is NVIDIA's to change: what is missing for the
ranges is a clear error. No report written by a real `nsys` was at hand to try this on.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import pandas as pd

from flashhead_profiles.ranges import DOMAIN, split_message
from flashhead_profiles.timeline import Trace, TraceError, TraceRange, Work, over_ranks, timeline

_PUSH_POP, _START_END, _DOMAIN_CREATE = 59, 60, 75
_MEMCPY = "CUPTI_ACTIVITY_KIND_MEMCPY"
_KERNEL = "CUPTI_ACTIVITY_KIND_KERNEL"
_RUNTIME = "CUPTI_ACTIVITY_KIND_RUNTIME"
_RANK_IN_NAME = re.compile(r"rank_?(\d+)")
_NO_KERNELS = "the report holds no CUDA kernels: nothing ran on a GPU, or nsys did not trace cuda"


def read_nsys(path: Path, rank: int | None = None) -> pd.DataFrame:
    """The timeline of one report.

    rank: where the file's name does not hold it as `rank0` or `rank_0`.

    Raises:
        TraceError: the file is no such database, or holds no range of ours.
    """
    return timeline(nsys_trace(path, rank))


def read_nsys_reports(paths: Iterable[Path]) -> pd.DataFrame:
    """The timeline of one capture, a report for each rank; see `read_nsys`."""
    return over_ranks(read_nsys(path) for path in paths)


def nsys_trace(path: Path, rank: int | None = None) -> Trace:
    """What `read_nsys` makes its frame of."""
    if not path.is_file():
        raise TraceError(f"cannot read {path}: there is no such file")
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
            database.row_factory = sqlite3.Row
            tables = _columns(database)
            if "NVTX_EVENTS" not in tables:
                raise TraceError(f"{path} holds no NVTX ranges: run nsys with --trace=cuda,nvtx")
            ranges = list(_ranges(database, tables))
            work = list(_work(database, tables))
    except (sqlite3.DatabaseError, KeyError, IndexError) as error:
        raise TraceError(
            f"{path} is not an SQLite export of Nsight Systems ({error}): make one with "
            f"nsys export --type sqlite"
        ) from error
    if not ranges:
        raise TraceError(
            f"{path} holds none of this project's ranges: take the report with launch/profile.sh"
        )
    if rank is None:
        named = _RANK_IN_NAME.search(path.name)
        if named is None:
            raise TraceError(f"the name of {path} does not say its rank: name it like rank0.sqlite")
        rank = int(named[1])
    missing = {}
    if not work:
        columns = ("kernels_us", "communication_us", "overlap_us")
        missing = dict.fromkeys(columns, _NO_KERNELS)
    return Trace(rank, ranges, work, missing)


def _columns(database: sqlite3.Connection) -> dict[str, set[str]]:
    """Columns by table."""
    names = [
        row[0] for row in database.execute("SELECT name FROM sqlite_master WHERE type='table'")
    ]
    return {
        name: {row["name"] for row in database.execute(f"PRAGMA table_info('{name}')")}
        for name in names
    }


def _ranges(database: sqlite3.Connection, tables: dict[str, set[str]]) -> Iterable[TraceRange]:
    columns = tables["NVTX_EVENTS"]
    strings = _strings(database, tables)
    rows = [dict(row) for row in database.execute("SELECT * FROM NVTX_EVENTS")]

    def text(row: dict[str, Any]) -> str:
        return row.get("text") or strings.get(row.get("textId"), "")

    domains = None
    if "domainId" in columns:
        created = [row for row in rows if row["eventType"] == _DOMAIN_CREATE]
        # A report without domain events cannot tell ours from others.
        domains = {row["domainId"] for row in created if text(row) == DOMAIN} if created else None
    for row in rows:
        if row["eventType"] not in (_PUSH_POP, _START_END) or row["end"] is None:
            continue
        if domains is not None and row["domainId"] not in domains:
            continue
        try:
            name, label = split_message(text(row))
        except ValueError:
            continue
        payload = row.get("int64Value")
        span = (row["start"] / 1e3, row["end"] / 1e3)
        yield TraceRange(name, label, payload, *span, row["globalTid"])


def _work(database: sqlite3.Connection, tables: dict[str, set[str]]) -> Iterable[Work]:
    """Kernels and copies with the call that launched them; a graph's all with its launch."""
    if _RUNTIME not in tables:
        return
    strings = _strings(database, tables)
    launches = {
        row["correlationId"]: (row["start"] / 1e3, row["globalTid"])
        for row in database.execute(f"SELECT * FROM {_RUNTIME}")
    }
    for table in (_KERNEL, _MEMCPY):
        if table not in tables:
            continue
        for row in database.execute(f"SELECT * FROM {table}"):
            launch = launches.get(row["correlationId"])
            if launch is None:
                continue
            name = strings.get(row["shortName"], "kernel") if table == _KERNEL else "copy"
            yield Work(name, row["start"] / 1e3, row["end"] / 1e3, *launch)


def _strings(database: sqlite3.Connection, tables: dict[str, set[str]]) -> dict[Any, str]:
    if "StringIds" not in tables:
        return {}
    return {row["id"]: row["value"] for row in database.execute("SELECT id, value FROM StringIds")}
