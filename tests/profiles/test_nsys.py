"""Reports of Nsight Systems, written here with the schema that its version 2021.5 documents."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from flashhead_profiles.nsys import read_nsys, read_nsys_reports
from flashhead_profiles.timeline import TraceError

SCHEMA = """
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
OURS, OTHER = 3, 4
US = 1000


def write(path: Path, *, schema: str = SCHEMA, ours: str = "flashhead") -> Path:
    """A step of 100 us with two launches: a kernel that runs later, and a collective."""
    with closing(sqlite3.connect(path)) as database:
        database.executescript(schema)
        names = ["head/centroids", "dots_kernel", "ncclDevKernel_AllReduce", "cudaLaunchKernel"]
        database.executemany("INSERT INTO StringIds VALUES (?, ?)", list(enumerate(names)))

        def nvtx(start: int, stop: int | None, kind: int, domain: int, **more: object) -> None:
            row = {"start": start * US, "end": None if stop is None else stop * US}
            row |= {"eventType": kind, "globalTid": 7, "domainId": domain} | more  # type: ignore
            keys = ", ".join(row)
            marks = ", ".join("?" * len(row))
            database.execute(
                f"INSERT INTO NVTX_EVENTS ({keys}) VALUES ({marks})", list(row.values())
            )

        nvtx(0, None, 75, OURS, text=ours)
        nvtx(0, None, 75, OTHER, text="NCCL")
        nvtx(1000, 1100, 59, OURS, text="step", int64Value=5)
        nvtx(1000, 1060, 59, OURS, textId=0)
        # Another library's range of the same name, a mark, and a range that never ended.
        nvtx(1010, 1020, 59, OTHER, text="step")
        nvtx(1010, 1011, 34, OURS, text="step")
        nvtx(1099, None, 59, OURS, text="head")
        for number, start in enumerate((1010, 1070)):
            database.execute(
                "INSERT INTO CUPTI_ACTIVITY_KIND_RUNTIME VALUES (?, ?, 0, 7, ?, 3, 0)",
                (start * US, (start + 5) * US, number),
            )
        database.executemany(
            "INSERT INTO CUPTI_ACTIVITY_KIND_KERNEL VALUES (?, ?, 0, 1, 7, ?, 1, 0, ?, NULL)",
            [(1065 * US, 1085 * US, 0, 1), (1080 * US, 1120 * US, 1, 2)],
        )
        database.commit()
    return path


def test_ranges_of_our_domain_with_payloads_kernels_and_communication(tmp_path: Path) -> None:
    frame = read_nsys(write(tmp_path / "rank2.sqlite"))
    assert list(frame["range"]) == ["step", "head/centroids"]
    step, centroids = frame.iloc[0], frame.iloc[1]
    assert (step["start_us"], step["duration_us"], step["payload"]) == (1000, 100, 5)
    assert (step["rank"], step["depth"], centroids["depth"]) == (2, 0, 1)
    assert (step["kernels_us"], step["communication_us"], step["overlap_us"]) == (20, 40, 5)
    # Its kernel ran when the range had ended.
    assert (centroids["kernels_us"], centroids["communication_us"]) == (20, 0)
    assert frame.attrs["missing"] == {}


def test_reports_of_several_ranks_are_one_frame(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"tp2_rank_{rank}.sqlite") for rank in (0, 1)]
    assert set(read_nsys_reports(paths)["rank"]) == {0, 1}


def test_without_a_gpu_kernels_are_missing_and_not_zero(tmp_path: Path) -> None:
    path = write(tmp_path / "rank0.sqlite")
    with closing(sqlite3.connect(path)) as database:
        database.execute("DROP TABLE CUPTI_ACTIVITY_KIND_KERNEL")
        database.execute("DROP TABLE CUPTI_ACTIVITY_KIND_RUNTIME")
        database.commit()
    frame = read_nsys(path)
    assert frame[["kernels_us", "communication_us", "overlap_us"]].isna().all(axis=None)
    assert "no CUDA kernels" in frame.attrs["missing"]["kernels_us"]


def test_what_is_no_report_of_ours_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="no such file"):
        read_nsys(tmp_path / "nothing.sqlite")
    (tmp_path / "text.sqlite").write_text("not a database, though long enough to be taken for one")
    with pytest.raises(TraceError, match="nsys export"):
        read_nsys(tmp_path / "text.sqlite")
    sqlite3.connect(tmp_path / "empty.sqlite").close()
    with pytest.raises(TraceError, match="trace=cuda,nvtx"):
        read_nsys(tmp_path / "empty.sqlite")
    with pytest.raises(TraceError, match=r"launch/profile\.sh"):
        read_nsys(write(tmp_path / "rank0.sqlite", ours="somebody"))
    with pytest.raises(TraceError, match="does not say its rank"):
        read_nsys(write(tmp_path / "report.sqlite"))
    assert set(read_nsys(tmp_path / "report.sqlite", rank=4)["rank"]) == {4}


def test_a_report_without_a_needed_column_is_a_sentence(tmp_path: Path) -> None:
    path = write(tmp_path / "rank0.sqlite")
    with closing(sqlite3.connect(path)) as database:
        database.execute("ALTER TABLE NVTX_EVENTS RENAME COLUMN eventType TO kind")
        database.commit()
    with pytest.raises(TraceError, match="eventType"):
        read_nsys(path)
