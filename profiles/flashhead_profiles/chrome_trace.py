"""Chrome traces as torch.profiler exports them (`export_chrome_trace`), read into the timeline.

Events of category `user_annotation` that bear one of our names are ranges. GPU kernels (category
`kernel`) are matched by their correlation number to the `cuda_runtime` or `cuda_driver` event that
launched them. On the CPU a backend's `gloo:all_reduce` and its like, which run on a thread of the
backend, are communication, and there are no kernels. Layout as torch 2.11 to 2.13 write it;
`distributedInfo.rank` gives the rank,
and without a process group the file's name, as in `rank0`.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from flashhead_profiles.ranges import split_message
from flashhead_profiles.timeline import Trace, TraceError, TraceRange, Work, over_ranks, timeline

_RANK_IN_NAME = re.compile(r"rank_?(\d+)")
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
    return timeline(chrome_trace(path, rank))


def read_chrome_traces(paths: Iterable[Path]) -> pd.DataFrame:
    """The timeline of one capture, a trace for each rank; see `read_chrome_trace`."""
    return over_ranks(read_chrome_trace(path) for path in paths)


def chrome_trace(path: Path, rank: int | None = None) -> Trace:
    """What `read_chrome_trace` makes its frame of."""
    document = _load(path)
    events = [event for event in document["traceEvents"] if event.get("ph") == "X"]
    ranges = list(_ranges(events))
    if not ranges:
        raise TraceError(
            f"{path} holds none of this project's ranges: take it with launch/profile.sh, or with "
            f"torch.profiler around code that enters flashhead_profiles.ranges"
        )
    if rank is None:
        named = _RANK_IN_NAME.search(path.name)
        rank = document.get("distributedInfo", {}).get("rank", int(named[1]) if named else 0)
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
