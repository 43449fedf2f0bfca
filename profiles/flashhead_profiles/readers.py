"""Readers of Chrome traces (torch.profiler), Nsight Compute tables, and whole profile folders.

**Chrome traces** (`export_chrome_trace`, torch 2.11 to 2.13): `user_annotation` events that bear
one of our names are ranges; kernels are matched by their correlation number to the `cuda_runtime`
or `cuda_driver` event that launched them. On the CPU `gloo:all_reduce` and its like, which run on a
thread of the backend, are communication, and there are no kernels.

**Nsight Compute**: `ncu --import REPORT --csv --page raw --print-units base`, a row of names, a row
of units, then a row a kernel (https://docs.nvidia.com/nsight-compute/NsightComputeCli/). Columns
are read by name, rows sorted by ID. No text of a real `ncu` was available to test this.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from flashhead_profiles.nsys import read_nsys
from flashhead_profiles.ranges import split_message
from flashhead_profiles.traces import (
    Trace,
    TraceError,
    TraceRange,
    Work,
    rank_in_name,
    timeline,
)

_LAUNCHES = ("cuda_runtime", "cuda_driver")
_ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
_NO_KERNELS = (
    "the trace holds no GPU kernels: it was taken on the CPU, whose compiled loops torch.profiler "
    "does not see"
)


def read_chrome_trace(path: Path, rank: int | None = None) -> pd.DataFrame:
    """The timeline of one trace (`.json` or `.json.gz`).

    rank: where the trace does not name its own, as a process without a group does not.

    Raises:
        TraceError: the file cannot be read, is no Chrome trace, or holds no range of ours.
    """
    return timeline(_chrome_trace(path, rank))


def _chrome_trace(path: Path, rank: int | None) -> Trace:
    document = _load(path)
    events = [event for event in document["traceEvents"] if event.get("ph") == "X"]
    ranges = list(_ranges(events))
    if not ranges:
        raise TraceError(
            f"{path} holds none of this project's ranges: take it with launch/profile.sh, or with "
            f"torch.profiler around code that enters flashhead_profiles.ranges"
        )
    if rank is None:
        rank = document.get("distributedInfo", {}).get("rank", rank_in_name(path) or 0)
    missing: dict[str, str] = {}
    work = list(_kernels(events))
    if not work:
        missing = {"kernels_us": _NO_KERNELS, "overlap_us": _NO_KERNELS}
        work = [
            found
            for event in events
            if event.get("cat") == "user_annotation"
            and (found := Work(event["name"], *_span(event))).is_communication
        ]
    return Trace(int(rank), ranges, work, missing)


def _load(path: Path) -> dict[str, Any]:
    try:
        raw = path.read_bytes()
        document = json.loads(gzip.decompress(raw) if path.suffix == ".gz" else raw)
        if isinstance(document["traceEvents"], list):
            return dict(document)
    except OSError as error:
        raise TraceError(f"cannot read {path} ({error.strerror or error}): give a trace") from error
    except (ValueError, KeyError, TypeError, EOFError) as error:
        raise TraceError(
            f"{path} is not a whole Chrome trace ({type(error).__name__}: {error}): take it again"
        ) from error
    raise TraceError(f"{path} is not a Chrome trace: its traceEvents are no list")


def _ranges(events: Iterable[dict[str, Any]]) -> Iterable[TraceRange]:
    for event in events:
        if event.get("cat") != "user_annotation":
            continue
        try:
            name, label = split_message(event["name"])
        except ValueError:
            continue
        yield TraceRange(name, label, None, *_span(event), _thread(event))


def _kernels(events: Iterable[dict[str, Any]]) -> Iterable[Work]:
    launches: dict[Any, dict[str, Any]] = {}
    on_gpu = []
    for event in events:
        category = event.get("cat")
        if category in _LAUNCHES and "correlation" in event.get("args", {}):
            launches[event["args"]["correlation"]] = event
        elif category in _ON_GPU:
            on_gpu.append(event)
    for event in on_gpu:
        launch = launches.get(event.get("args", {}).get("correlation"))
        if launch is not None:
            yield Work(event["name"], *_span(event), float(launch["ts"]), _thread(launch))


def _span(event: dict[str, Any]) -> tuple[float, float]:
    start_us = float(event["ts"])
    return start_us, start_us + float(event.get("dur", 0.0))


def _thread(event: dict[str, Any]) -> tuple[Any, Any]:
    return event.get("pid"), event.get("tid")


_METRICS = {
    "time_us": "gpu__time_duration.sum",
    "dram_read_bytes": "dram__bytes_read.sum",
    "dram_written_bytes": "dram__bytes_write.sum",
    "l2_hit_rate": "lts__t_sector_hit_rate.pct",
}
_FACTORS = {
    "time_us": {"ns": 1e-3, "nsecond": 1e-3, "us": 1.0, "usecond": 1.0},
    "dram_read_bytes": {"byte": 1.0},
    "dram_written_bytes": {"byte": 1.0},
    "l2_hit_rate": {"%": 0.01},
}


def read_ncu(path: Path, rank: int | None = None) -> pd.DataFrame:
    """One row a profiled kernel: times, bytes, share of L2 sectors that hit, bytes a second.

    A metric that was not collected is NaN, and `frame.attrs["missing"]` says so.
    rank: where the file's name does not hold it as `rank0`.

    Raises:
        TraceError: the file cannot be read, is not such a table, or has a unit that is not known.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(f"cannot read {path} ({error}): give a text that ncu printed") from error
    # ncu may say something before the table.
    first = next((i for i, line in enumerate(lines) if '"Kernel Name"' in line), None)
    if first is None:
        raise TraceError(
            f"{path} holds no table of kernels: make it with ncu --import REPORT --csv --page raw "
            f"--print-units base"
        )
    table = pd.read_csv(path, skiprows=first, dtype=str, keep_default_na=False)
    if len(table) < 2:
        raise TraceError(f"{path} holds no kernel: none of a head's ran inside a capture")
    units, rows = table.iloc[0], table.iloc[1:]
    if "ID" in rows:
        order = pd.to_numeric(rows["ID"], errors="coerce").argsort(kind="stable")
        rows = rows.iloc[order.to_numpy()]
    if rank is None:
        rank = rank_in_name(path) or 0
    frame = pd.DataFrame({"kernel": rows["Kernel Name"].to_list(), "rank": rank})
    missing: dict[str, str] = {}
    for column, metric in _METRICS.items():
        if metric not in table.columns:
            frame[column] = np.nan
            missing[column] = f"ncu did not collect {metric}"
            continue
        factor = _FACTORS[column].get(units[metric])
        if factor is None:
            raise TraceError(
                f"{path} gives {metric} in {units[metric]!r}: print it with --print-units base"
            )
        numbers = pd.to_numeric(rows[metric].str.replace(",", ""), errors="coerce")
        frame[column] = numbers.to_numpy() * factor
    moved = frame["dram_read_bytes"] + frame["dram_written_bytes"]
    frame["achieved_bytes_per_s"] = moved / (frame["time_us"] * 1e-6)
    frame.attrs["missing"] = missing
    return frame


@dataclass(frozen=True)
class Profile:
    """What a folder holds; None for a kind of report that it has none of.

    timeline: as `flashhead_profiles.traces` describes it, with a column `capture`: the name of
        the file without its rank. counters: see `ncu`.
    """

    timeline: pd.DataFrame | None
    counters: pd.DataFrame | None


def read_profile(folder: Path) -> Profile:
    """Read every report of a folder.

    Raises:
        TraceError: no such folder, nothing in it, or a report that cannot be read.
    """
    if not folder.is_dir():
        raise TraceError(f"there is no folder {folder}: name one that launch/profile.sh has filled")
    frames = []
    for path in sorted([*folder.glob("*rank*.json*"), *folder.glob("*rank*.sqlite")]):
        reads = read_nsys if path.suffix == ".sqlite" else read_chrome_trace
        frame = reads(path)
        frames.append(frame.assign(capture=_capture_of(path, int(frame["rank"].iloc[0]))))
    counters = [read_ncu(path) for path in sorted(folder.glob("counters_*.csv"))]
    if not frames and not counters:
        raise TraceError(f"{folder} holds no report of a rank: fill it with launch/profile.sh")
    return Profile(together(frames), together(counters))


def _capture_of(path: Path, rank: int) -> str:
    """What a report's name says beside its rank: `tp2_1` of `tp2_1_rank0.json`.

    nsys numbers the captures of a run behind the name: `rank0.2.sqlite` is capture `2`.
    """
    name = path.name.removesuffix(".gz").removesuffix(".json").removesuffix(".sqlite")
    return name.replace(f"rank{rank}", "").replace(f"rank_{rank}", "").strip("_.")


def together(frames: list[pd.DataFrame]) -> pd.DataFrame | None:
    if not frames:
        return None
    whole = pd.concat(frames, ignore_index=True)
    whole.attrs["missing"] = {k: v for f in frames for k, v in f.attrs["missing"].items()}
    return whole
