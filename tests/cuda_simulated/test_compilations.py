"""The real Triton compiler over a stub driver: how often kernels are compiled, and for where."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cuda_simulated.conftest import Small

ROOT = Path(__file__).parents[2]
BATCHES = (1, 3, 4, 5, 7, 8, 33, 48, 64)


@pytest.fixture(scope="module", params=[1, 2])
def compiled(
    request: pytest.FixtureRequest, small: Small, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What `compile_heads` prints, for one launch of flashhead and two.

    Triton's cache outlives the test run.
    """
    assert request.config.cache is not None
    environment = os.environ | {
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(request.config.cache.mkdir("triton")),
        "TRITON_DEFAULT_FP_FUSION": "1",
        "FLASHHEAD_CACHE": str(tmp_path_factory.mktemp("cache")),
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("compile_heads.py"), small.folder,
         small.index_dir, str(request.param), *map(str, BATCHES)],
        env=environment, capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_batch_sizes_that_are_padded_alike_share_a_kernel(compiled: dict[str, Any]) -> None:
    padded = {1 << (size - 1).bit_length() for size in BATCHES}
    assert len(compiled["compilations"]) >= 2
    for kernel, times in compiled["compilations"].items():
        assert times <= len(padded), kernel


def test_kernels_are_launched_on_the_device_of_their_tensors(compiled: dict[str, Any]) -> None:
    assert {kernel for kernel, _ in compiled["launched"]} == set(compiled["compilations"])
    assert {device for _, device in compiled["launched"]} == {1}


def test_many_batch_sizes_hold_little_more_memory_than_the_largest(
    compiled: dict[str, Any],
) -> None:
    after_all, after_largest = compiled["held_bytes"]
    assert after_largest > 0
    assert after_all <= 1.5 * after_largest
