"""The kernels compile for an H200 without one, spill nothing, and use the instructions meant."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
# compile_ahead turns Triton's interpreter off as it is imported, which other tests need on.
PIECES = """
import json, sys, compile_ahead, resources
from dataclasses import asdict
loop = compile_ahead.main_loop(sys.stdin.read())
made = dict(kernel="k", case="c", grid=(1,), warps=4, registers=32, barriers=0, loop_barriers=0,
            loop_bytes=0, loads_of_16_bytes=0, dp4a=0, fma=0, row_layout="")
given = [(90, 0, 100 << 10), (89, 0, 99 << 10), (89, 0, (99 << 10) + 1), (90, 8, 0)]
found = [compile_ahead.Resources(**made, capability=c, stack_bytes=b, shared_bytes=s)
         for c, b, s in given]
print(json.dumps([asdict(loop), [resources.faults([one], 0) for one in found],
                  resources.faults(found, 8)]))
"""
SASS = """
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0010*/                   IDP.4A.S8.S8 R5, R4, R6, R5 ;
        /*0020*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0030*/              @!P0 LDG.E.U16.CONSTANT R7, desc[UR4][R2.64] ;
        /*0040*/                   LDGSTS.E.BYPASS.128 [R8], desc[UR4][R2.64] ;
        /*0050*/               @P1 BRA 0x10 ;
        /*0060*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0070*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0080*/                   LDG.E R4, desc[UR4][R2.64] ;
        /*0090*/              @!P2 BRA 0x60 ;
        /*00a0*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*00b0*/               @P3 BRA 0x0 ;
        /*00c0*/                   EXIT ;
        /*00d0*/                   BRA 0xd0;
"""


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    """Two models: in one a thread holds a pair of scale groups, whose products could be fused."""
    import triton

    # An older compiler keeps a few registers of candidates_kernel in memory, once a program.
    older = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9)
    command = [sys.executable, str(KERNELS / "resources.py"), "--tp-sizes", "8", "--json"]
    command += ["--models", "gemma-3-270m", "llama-3.2-1b"]
    command += ["--allow-spill-bytes", "16" if older else "0"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


@pytest.mark.timeout(900)
def test_shipped_shapes_compile_as_they_are_launched(compiled: list[dict[str, Any]]) -> None:
    assert {item["kernel"] for item in compiled} >= {
        "one_launch_kernel", "candidates_kernel", "dots_kernel", "dense_kernel", "exchange_kernel"
    }  # fmt: skip
    assert any("dense, batch 64, float32 states" in item["case"] for item in compiled)
    assert any("fewer columns" in item["case"] for item in compiled)
    drawn = {item["kernel"] for item in compiled if "draw" in item["case"]}
    assert len(drawn - {item["kernel"] for item in compiled if "draw" not in item["case"]}) == 9
    for item in compiled:
        # An L40 has less shared memory than an H200, and the launches are the same.
        assert item["shared_bytes"] <= 99 << 10, item
        scores_centroids = item["kernel"] in ("one_launch_kernel", "dots_kernel")
        assert (item["dp4a"] > 0) is scores_centroids, item
        reads_rows = ("candidates_kernel", "dense_kernel", "logits_kernel", "scores_kernel")
        if scores_centroids or item["kernel"] in reads_rows:
            assert item["loads_of_16_bytes"] > 0, item
    # A dense head fills an H200's 132 processors.
    dense = next(item for item in compiled if item["kernel"] == "dense_kernel")
    assert dense["grid"][0] >= 132
    exchanges = [item for item in compiled if item["kernel"] == "exchange_kernel"]
    assert [item["case"] for item in exchanges] == ["2 ranks", "4 ranks", "8 ranks"]
    assert all(item["registers"] <= 32 for item in exchanges)


@pytest.mark.timeout(900)
def test_one_launch_and_two_fuse_the_same_sums(compiled: list[dict[str, Any]]) -> None:
    """Else they could give other bits: integer scores fuse nothing; a row's sum has one order.

    With `a * b` for `rounded_product` Llama's scores fuse eight products in two launches, batch 8.
    """
    found = {(item["kernel"], item["case"]): item for item in compiled}
    pairs = 0
    for (kernel, case), item in found.items():
        if kernel == "dots_kernel":
            assert item["fma"] == 0, case
        one = found.get(("one_launch_kernel", case.replace("two launches", "one launch")))
        if kernel == "candidates_kernel" and one is not None:
            assert item["row_layout"] == one["row_layout"] == "8, 2x16", case
            # A log-sum-exp fuses products of its own, as many as a thread has clusters.
            if "log-sum-exp" not in case:
                assert item["fma"] == one["fma"] > 0, case
            pairs += 1
    assert pairs >= 4


def test_the_main_loop_and_the_faults_are_found() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PIECES], input=SASS, capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONPATH": str(KERNELS)},
    )  # fmt: skip
    loop, each, spills_allowed = json.loads(done.stdout)
    # The first loop has integer dot products, the second loads more, the third encloses both.
    assert loop == {"barriers": 1, "loaded_bytes": 18, "rounds": 1}
    assert [len(lines) for lines in each] == [0, 0, 1, 1]
    assert "shared memory" in each[2][0]
    assert "spills 8 bytes" in each[3][0]
    assert len(spills_allowed) == 1
