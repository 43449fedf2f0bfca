"""Chrome traces: one of a GPU as torch.profiler lays it out, and files that are none of ours."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from flashhead_profiles.readers import read_chrome_trace
from flashhead_profiles.traces import TraceError


def event(name: str, category: str, start: float, us: float, **more: Any) -> dict[str, Any]:
    found = {"ph": "X", "cat": category, "name": name, "pid": 9, "tid": 9, "ts": start, "dur": us}
    return found | more


def gpu_trace() -> dict[str, Any]:
    """Two kernels and a collective, launched in a step and run when it had ended."""
    events = [
        event("step", "user_annotation", 100.0, 50.0),
        event("head:flashhead", "user_annotation", 101.0, 45.0),
        event("head/exchange", "user_annotation", 130.0, 10.0),
        # The same range again as torch.profiler projects it onto the GPU.
        event("step", "gpu_user_annotation", 160.0, 90.0, pid=0, tid=7),
        event("nccl:all_reduce", "user_annotation", 131.0, 5.0),
        event("cudaLaunchKernel", "cuda_runtime", 105.0, 2.0, args={"correlation": 1}),
        event("cuLaunchKernelEx", "cuda_driver", 110.0, 2.0, args={"correlation": 2}),
        event("cudaLaunchKernelExC", "cuda_runtime", 132.0, 2.0, args={"correlation": 3}),
        event("dots_kernel", "kernel", 160.0, 30.0, pid=0, tid=7, args={"correlation": 1}),
        event("candidates_kernel", "kernel", 190.0, 20.0, pid=0, tid=7, args={"correlation": 2}),
        event("ncclDevKernel_AllReduce", "kernel", 200.0, 40.0, pid=0, args={"correlation": 3}),
        event("orphan", "kernel", 300.0, 40.0, pid=0, args={"correlation": 99}),
        {"ph": "i", "s": "g", "name": "step", "ts": 100.0},
    ]
    return {"schemaVersion": 1, "distributedInfo": {"rank": 5}, "traceEvents": events}


def test_kernels_are_matched_by_correlation_whoever_launched_them(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_text(json.dumps(gpu_trace()))
    frame = read_chrome_trace(path)
    assert list(frame["range"]) == ["step", "head", "head/exchange"]
    assert list(frame["label"])[1] == "flashhead"
    assert list(frame["kernels_us"]) == [50, 50, 0]
    assert list(frame["communication_us"]) == [40, 40, 40]
    assert list(frame["overlap_us"]) == [10, 10, 0]
    assert set(frame["rank"]) == {5}
    assert set(read_chrome_trace(path, rank=2)["rank"]) == {2}


def test_a_compressed_trace_is_read(tmp_path: Path) -> None:
    path = tmp_path / "trace.json.gz"
    path.write_bytes(gzip.compress(json.dumps(gpu_trace()).encode()))
    assert len(read_chrome_trace(path)) == 3


def test_a_trace_without_our_ranges_is_a_sentence(tmp_path: Path) -> None:
    document = gpu_trace()
    document["traceEvents"] = document["traceEvents"][4:]
    path = tmp_path / "trace.json"
    path.write_text(json.dumps(document))
    with pytest.raises(TraceError, match=r"none of this project's ranges.*launch/profile\.sh"):
        read_chrome_trace(path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (json.dumps(gpu_trace())[:-40], "not a whole Chrome trace"),
        ("[]", "not a whole Chrome trace"),
        ('{"traceEvents": {}}', "no list"),
        ("", "not a whole Chrome trace"),
    ],
)
def test_a_damaged_trace_is_a_sentence(tmp_path: Path, content: str, says: str) -> None:
    path = tmp_path / "trace.json"
    path.write_text(content)
    with pytest.raises(TraceError, match=says) as caught:
        read_chrome_trace(path)
    assert "trace.json" in str(caught.value)


def test_a_missing_trace_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="No such file"):
        read_chrome_trace(tmp_path / "nothing.json")
