"""Reports of Nsight Systems, written here with two documented schemas, in any order of rows.

`SCHEMA_2021` is that of "SQLite Export Schema Reference" of version 2021.5, with columns that this
project does not read left out. `SCHEMA_2026` is the User Guide's of 2024, which the release notes
of 2025.6 keep for the versions of 2026 while they give up the order of rows: columns stand between
the older ones (greenContextId where the guide's GRAPH_TRACE has it), and there is META_DATA_EXPORT.
"""

from __future__ import annotations

import random
import sqlite3
from contextlib import closing
from pathlib import Path

import pandas as pd
import pytest

from flashhead_profiles.nsys import read_nsys
from flashhead_profiles.readers import read_profile
from flashhead_profiles.traces import TraceError

SCHEMA_2021 = """
CREATE TABLE StringIds (id INTEGER NOT NULL PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE NVTX_EVENTS (start INTEGER NOT NULL, end INTEGER, eventType INTEGER NOT NULL,
    rangeId INTEGER, category INTEGER, color INTEGER, text TEXT, globalTid INTEGER,
    endGlobalTid INTEGER, textId INTEGER, domainId INTEGER, uint64Value INTEGER,
    int64Value INTEGER, doubleValue REAL, uint32Value INTEGER, int32Value INTEGER,
    floatValue REAL, jsonTextId INTEGER, jsonText TEXT);
CREATE TABLE CUPTI_ACTIVITY_KIND_RUNTIME (start INTEGER NOT NULL, end INTEGER NOT NULL,
    eventClass INTEGER NOT NULL, globalTid INTEGER, correlationId INTEGER,
    nameId INTEGER NOT NULL, returnValue INTEGER NOT NULL);
CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL (start INTEGER NOT NULL, end INTEGER NOT NULL,
    deviceId INTEGER NOT NULL, contextId INTEGER NOT NULL, streamId INTEGER NOT NULL,
    correlationId INTEGER, globalPid INTEGER, demangledName INTEGER NOT NULL,
    shortName INTEGER NOT NULL, graphNodeId INTEGER);
"""
SCHEMA_2026 = """
CREATE TABLE META_DATA_EXPORT (name TEXT NOT NULL, value TEXT);
INSERT INTO META_DATA_EXPORT VALUES ('EXPORT_SCHEMA_VERSION', '3.24.14');
CREATE TABLE StringIds (id INTEGER NOT NULL PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE NVTX_EVENTS (start INTEGER NOT NULL, end INTEGER, eventType INTEGER NOT NULL,
    rangeId INTEGER, category INTEGER, color INTEGER, text TEXT, globalTid INTEGER,
    endGlobalTid INTEGER, textId INTEGER, domainId INTEGER, uint64Value INTEGER,
    int64Value INTEGER, doubleValue REAL, uint32Value INTEGER, int32Value INTEGER,
    floatValue REAL, jsonTextId INTEGER, jsonText TEXT);
CREATE TABLE CUPTI_ACTIVITY_KIND_RUNTIME (start INTEGER NOT NULL, end INTEGER NOT NULL,
    eventClass INTEGER NOT NULL, globalTid INTEGER, correlationId INTEGER,
    nameId INTEGER NOT NULL, returnValue INTEGER NOT NULL, callchainId INTEGER);
CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL (start INTEGER NOT NULL, end INTEGER NOT NULL,
    deviceId INTEGER NOT NULL, contextId INTEGER NOT NULL, greenContextId INTEGER,
    streamId INTEGER NOT NULL, correlationId INTEGER, globalPid INTEGER,
    demangledName INTEGER NOT NULL, shortName INTEGER NOT NULL, mangledName INTEGER,
    launchType INTEGER, graphNodeId INTEGER);
"""
OURS, OTHER = 3, 4
US = 1000
NAMES = [
    "head/centroids", "dots_kernel", "ncclDevKernel_AllReduce", "cudaLaunchKernel", "step", "head",
    "flashhead", "NCCL",
]  # fmt: skip
Rows = list[tuple[str, dict[str, object]]]


def rows_of_a_step(ours: str = "flashhead", *, registered: bool = False) -> Rows:
    """A step of 100 us with two launches: a kernel that runs later, and a collective.

    registered: texts lie in StringIds.
    """

    def nvtx(
        start: int, stop: int | None, kind: int, domain: int, text: str, payload: int | None = None
    ) -> tuple[str, dict[str, object]]:
        known: dict[str, object] = {"text": text}
        if registered and text in NAMES:
            known = {"textId": NAMES.index(text)}
        return "NVTX_EVENTS", {
            "start": start * US,
            "end": None if stop is None else stop * US,
            "eventType": kind,
            "globalTid": 7,
            "domainId": domain,
            "int64Value": payload,
        } | known

    def launch(number: int, start: int) -> tuple[str, dict[str, object]]:
        return "CUPTI_ACTIVITY_KIND_RUNTIME", {
            "start": start * US, "end": (start + 5) * US, "eventClass": 0, "globalTid": 7,
            "correlationId": number, "nameId": 3, "returnValue": 0,
        }  # fmt: skip

    def kernel(number: int, start: int, stop: int, name: int) -> tuple[str, dict[str, object]]:
        return "CUPTI_ACTIVITY_KIND_KERNEL", {
            "start": start * US, "end": stop * US, "deviceId": 0, "contextId": 1, "streamId": 7,
            "correlationId": number, "globalPid": 1, "demangledName": 0, "shortName": name,
        }  # fmt: skip

    return [
        nvtx(0, None, 75, OURS, ours),
        nvtx(0, None, 75, OTHER, "NCCL"),
        nvtx(1000, 1100, 59, OURS, "step", 5),
        # The step's whole time: only the names tell which one is inside.
        nvtx(1000, 1100, 59, OURS, "head:flashhead"),
        nvtx(1000, 1060, 59, OURS, "head/centroids"),
        # Another library's range of the same name, a mark, and a range that never ended.
        nvtx(1010, 1020, 59, OTHER, "step"),
        nvtx(1010, 1011, 34, OURS, "step"),
        nvtx(1099, None, 59, OURS, "head"),
        launch(0, 1010),
        launch(1, 1070),
        kernel(0, 1065, 1085, 1),
        kernel(1, 1080, 1120, 2),
    ]


def write(
    path: Path,
    *,
    schema: str = SCHEMA_2021,
    ours: str = "flashhead",
    rows: Rows | None = None,
) -> Path:
    """A report of `rows`, inserted in their order; of a step by default."""
    with closing(sqlite3.connect(path)) as database:
        database.executescript(schema)
        database.executemany("INSERT INTO StringIds VALUES (?, ?)", list(enumerate(NAMES)))
        for table, row in rows_of_a_step(ours) if rows is None else rows:
            marks = ", ".join("?" * len(row))
            keys = ", ".join(f'"{key}"' for key in row)
            database.execute(f"INSERT INTO {table} ({keys}) VALUES ({marks})", list(row.values()))
        database.commit()
    return path


def drop(path: Path, *tables: str) -> Path:
    with closing(sqlite3.connect(path)) as database:
        for table in tables:
            database.execute(f"DROP TABLE {table}")
        database.commit()
    return path


@pytest.mark.parametrize("registered", [False, True])
@pytest.mark.parametrize("schema", [SCHEMA_2021, SCHEMA_2026])
def test_ranges_of_our_domain_with_payloads_kernels_and_communication(
    tmp_path: Path, schema: str, registered: bool
) -> None:
    rows = rows_of_a_step(registered=registered)
    frame = read_nsys(write(tmp_path / "rank2.sqlite", schema=schema, rows=rows))
    assert list(frame["range"]) == ["step", "head", "head/centroids"]
    assert list(frame["depth"]) == [0, 1, 2]
    step, centroids = frame.iloc[0], frame.iloc[2]
    assert (step["start_us"], step["duration_us"], step["payload"]) == (1000, 100, 5)
    assert (step["rank"], centroids["label"]) == (2, "flashhead")
    assert (step["kernels_us"], step["communication_us"], step["overlap_us"]) == (20, 40, 5)
    # Its kernel ran when the range had ended.
    assert (centroids["kernels_us"], centroids["communication_us"]) == (20, 0)
    assert frame.attrs["missing"] == {}


@pytest.mark.parametrize("schema", [SCHEMA_2021, SCHEMA_2026])
def test_rows_in_any_order_give_the_same_frame(tmp_path: Path, schema: str) -> None:
    """Versions of 2026 promise no order of exported rows, not even that of time."""
    rows = rows_of_a_step(registered=True)
    in_order = read_nsys(write(tmp_path / "rank0.sqlite", schema=schema, rows=rows))
    for seed in range(5):
        shuffled = random.Random(seed).sample(rows, len(rows))
        path = write(tmp_path / f"{seed}_rank0.sqlite", schema=schema, rows=shuffled)
        pd.testing.assert_frame_equal(read_nsys(path), in_order)


def test_reports_of_several_ranks_are_one_frame(tmp_path: Path) -> None:
    for rank in (0, 1):
        write(tmp_path / f"tp2_rank_{rank}.sqlite")
    found = read_profile(tmp_path).timeline
    assert found is not None
    assert set(found["rank"]) == {0, 1}


@pytest.mark.parametrize(
    ("dropped", "named"),
    [
        (
            ["CUPTI_ACTIVITY_KIND_KERNEL", "CUPTI_ACTIVITY_KIND_RUNTIME"],
            "CUPTI_ACTIVITY_KIND_KERNEL",
        ),
        (["CUPTI_ACTIVITY_KIND_RUNTIME"], "CUPTI_ACTIVITY_KIND_RUNTIME"),
    ],
)
def test_without_a_table_of_the_gpu_kernels_are_missing_and_not_zero(
    tmp_path: Path, dropped: list[str], named: str
) -> None:
    frame = read_nsys(drop(write(tmp_path / "rank0.sqlite"), *dropped))
    assert frame[["kernels_us", "communication_us", "overlap_us"]].isna().all(axis=None)
    assert named in frame.attrs["missing"]["kernels_us"]


def test_graphs_that_were_traced_whole_are_named_with_the_option(tmp_path: Path) -> None:
    path = drop(write(tmp_path / "rank0.sqlite"), "CUPTI_ACTIVITY_KIND_KERNEL")
    with closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE CUPTI_ACTIVITY_KIND_GRAPH_TRACE (start INTEGER)")
        database.commit()
    assert "cuda-graph-trace=node" in read_nsys(path).attrs["missing"]["kernels_us"]


def test_kernels_whose_launches_are_not_in_the_report_are_missing_and_not_zero(
    tmp_path: Path,
) -> None:
    rows = [row for row in rows_of_a_step() if row[0] != "CUPTI_ACTIVITY_KIND_RUNTIME"]
    frame = read_nsys(write(tmp_path / "rank0.sqlite", rows=rows))
    assert frame["kernels_us"].isna().all()


def test_what_is_no_report_of_ours_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="no such file"):
        read_nsys(tmp_path / "nothing.sqlite")
    (tmp_path / "text.sqlite").write_text("not a database, though long enough to be taken for one")
    with pytest.raises(TraceError, match="nsys export"):
        read_nsys(tmp_path / "text.sqlite")
    sqlite3.connect(tmp_path / "empty.sqlite").close()
    with pytest.raises(TraceError, match="NVTX_EVENTS"):
        read_nsys(tmp_path / "empty.sqlite")
    with pytest.raises(TraceError, match="StringIds"):
        read_nsys(drop(write(tmp_path / "texts_rank0.sqlite"), "StringIds"))
    with pytest.raises(TraceError, match=r"launch/profile\.sh"):
        read_nsys(write(tmp_path / "rank0.sqlite", ours="somebody"))
    with pytest.raises(TraceError, match="rank"):
        read_nsys(write(tmp_path / "report.sqlite"))
    assert set(read_nsys(tmp_path / "report.sqlite", rank=4)["rank"]) == {4}


def test_a_report_without_a_needed_column_is_a_sentence(tmp_path: Path) -> None:
    path = write(tmp_path / "rank0.sqlite")
    with closing(sqlite3.connect(path)) as database:
        database.execute("ALTER TABLE NVTX_EVENTS RENAME COLUMN eventType TO kind")
        database.commit()
    with pytest.raises(TraceError, match="eventType"):
        read_nsys(path)
