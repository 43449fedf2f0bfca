"""The kernels compile for an H200 without one, spill nothing, and use the instructions meant."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

RESOURCES = Path(__file__).parents[2] / "kernels" / "resources.py"


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    """Two models: in one a thread holds a pair of scale groups, whose products could be fused."""
    models = ("Gemma-3-270M", "Llama-3.2-1B")
    done = subprocess.run(
        [sys.executable, RESOURCES, "--models", *models, "--json"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


@pytest.mark.timeout(600)
def test_default_shapes_compile_without_spilling(compiled: list[dict[str, Any]]) -> None:
    assert {item["kernel"] for item in compiled} == {
        "one_launch_kernel", "candidates_kernel", "dots_kernel", "dense_kernel", "exchange_kernel",
        "project_kernel",
    }  # fmt: skip
    for item in compiled:
        extras = "4 best of all" in item["shape"] or "unprobed" in item["shape"]
        # Llama's groups of 256 clusters leave 64 registers a thread: four of them, once a program.
        limit = 0 if "Gemma" in item["shape"] or not extras else 16
        assert item["stack_bytes"] <= limit, item
        assert (item["loads_of_16_bytes"] > 0) is (item["kernel"] != "exchange_kernel"), item
        scores_centroids = item["kernel"] in ("one_launch_kernel", "dots_kernel")
        assert (item["dp4a"] > 0) is scores_centroids, item
    exchanges = [item for item in compiled if item["kernel"] == "exchange_kernel"]
    assert [item["shape"] for item in exchanges] == ["2 ranks", "4 ranks", "8 ranks"]
    assert all(item["registers"] <= 32 for item in exchanges)


def test_one_launch_and_two_fuse_the_same_sums(compiled: list[dict[str, Any]]) -> None:
    """Else they could give other bits: integer scores fuse nothing, rows the same in both kernels.

    With `a * b` for `rounded_product` Llama's scores fuse eight products in two launches, batch 8.
    """
    fused = {(item["kernel"], item["shape"]): item["fma"] for item in compiled}
    for (kernel, shape), number in fused.items():
        if kernel == "dots_kernel":
            assert number == 0, shape
        if kernel == "candidates_kernel":
            assert number == fused["one_launch_kernel", shape] > 0, shape
