"""NVTX ranges as a tool receives them, without a GPU: a small C library listens in a process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

SOURCE = Path(__file__).with_name("nvtx_listener.c")
COMPILER = shutil.which("cc") or shutil.which("gcc")
RANGES = """
from flashhead_profiles import ranges
from flashhead_profiles.ranges import annotate, in_parts, attach_nvtx

assert attach_nvtx()
for step in range(2):
    with annotate(ranges.STEP, step), annotate(ranges.HEAD, 4, "flashhead"):
        with in_parts(ranges.CENTROIDS, ranges.CANDIDATES) as next_part:
            next_part()
        with annotate(ranges.EXCHANGE, 8):
            pass
"""
HEAD = """
import torch
from flashhead_dist.parallel import TensorParallel
from flashhead_dist.heads.dense import DenseLocalMax

head = DenseLocalMax(TensorParallel.single(), torch.randn(32, 8), 32)
head.forward(torch.randn(3, 8))
"""

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="needs a C compiler"),
    pytest.mark.skipif(find_spec("nvtx") is None, reason="needs the nvtx package"),
]


@pytest.fixture(scope="module")
def listener(tmp_path_factory: pytest.TempPathFactory) -> Path:
    assert COMPILER is not None
    library = tmp_path_factory.mktemp("nvtx") / "listener.so"
    command = [COMPILER, "-shared", "-fPIC", "-O1", "-Wall", "-Werror", SOURCE, "-o", library]
    subprocess.run(command, check=True)
    return library


def heard(listener: Path, folder: Path, code: str) -> list[dict[str, Any]]:
    log = folder / "events.jsonl"
    environment = os.environ | {"NVTX_INJECTION64_PATH": str(listener), "NVTX_LOG": str(log)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in log.read_text().splitlines()]


def test_a_tool_receives_names_payloads_and_nesting_in_one_domain(
    listener: Path, tmp_path: Path
) -> None:
    events = heard(listener, tmp_path, RANGES)
    assert {event["domain"] for event in events} == {"flashhead"}
    assert len(events) == 2 * 2 * 5
    one = [
        (event["event"], event.get("message"), event.get("payload"), event["depth"])
        for event in events[10:]
    ]
    assert one == [
        ("push", "step", 1, 0),
        ("push", "head:flashhead", 4, 1),
        ("push", "head/centroids", None, 2),
        ("pop", None, None, 2),
        ("push", "head/candidates", None, 2),
        ("pop", None, None, 2),
        ("push", "head/exchange", 8, 2),
        ("pop", None, None, 2),
        ("pop", None, None, 1),
        ("pop", None, None, 0),
    ]


def test_a_head_emits_its_ranges_to_a_tool(listener: Path, tmp_path: Path) -> None:
    events = heard(listener, tmp_path, HEAD)
    pushed = [event["message"] for event in events if event["event"] == "push"]
    assert pushed == ["head:dense_local_max", "head/check", "head/candidates", "head/result"]
    assert events[0]["payload"] == 3


def test_without_a_tool_nothing_is_attached(tmp_path: Path) -> None:
    code = "from flashhead_profiles.ranges import attach_nvtx; assert not attach_nvtx()"
    environment = {k: v for k, v in os.environ.items() if k != "NVTX_INJECTION64_PATH"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=120)
