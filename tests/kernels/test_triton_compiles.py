"""The kernels compile for an H200 without one, spill nothing, and use the instructions meant."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

RESOURCES = Path(__file__).parents[2] / "kernels" / "resources.py"


@pytest.mark.timeout(600)
def test_default_shapes_compile_without_spilling() -> None:
    done = subprocess.run(
        [sys.executable, RESOURCES, "--models", "Gemma-3-270M", "--json"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {item["kernel"] for item in found} == {
        "one_launch_kernel", "candidates_kernel", "dots_kernel", "dense_kernel",
    }  # fmt: skip
    for item in found:
        assert item["stack_bytes"] == 0, item
        assert item["loads_of_16_bytes"] > 0, item
        scores_centroids = item["kernel"] in ("one_launch_kernel", "dots_kernel")
        assert (item["dp4a"] > 0) is scores_centroids, item
