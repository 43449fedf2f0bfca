"""The kernels of sampling compile for an H200 without one, spill nothing and fit every card."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
_SHARED_BYTES = 99 * 1024
"""What a program may take on the card that has least."""


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    """In a process of its own: what the tests interpret cannot be compiled beside it."""
    here = Path(__file__)
    done = subprocess.run(
        [sys.executable, here.with_name("compile_sampling.py")],
        capture_output=True,
        text=True,
        cwd=here.parents[2],
    )
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


@pytest.mark.timeout(600)
def test_kernels_spill_nothing_and_fit(compiled: list[dict[str, Any]]) -> None:
    assert len({item["kernel"] for item in compiled}) == 9
    assert [item for item in compiled if item["stack_bytes"]] == []
    assert [item for item in compiled if item["shared_bytes"] > _SHARED_BYTES] == []


def test_rows_are_read_sixteen_bytes_at_a_time(compiled: list[dict[str, Any]]) -> None:
    readers = [item for item in compiled if item["kernel"] in ("logits_kernel", "scores_kernel")]
    assert len(readers) == 8
    assert min(item["loads_of_16_bytes"] for item in readers) > 0
