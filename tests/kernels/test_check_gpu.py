"""kernels/check_gpu.py: all of it simulated on a bare Python, and what becomes of bad stages."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import check_gpu

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
STAGES = ["compile", "correct", "bench", "parts", "exchange", "graph"]
# What a bare image with torch and Triton lacks; the project is not installed there.
BLOCKER = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in (
            "rich", "nvtx", "gguf", "faiss", "deepspeed", "compressed_tensors", "vllm", "lm_eval",
            "psutil", "transformers", "tests", "tyro", "flashhead_topology", "flashhead_profiles",
        ):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
"""
# Stands in for check_stages.py: each stage ends in a way of its own.
FAKE = """
import json, os, pathlib, signal, sys, time

stage, out = sys.argv[1], pathlib.Path(sys.argv[3])
path = out / f"{stage}.json"
passed = {"stage": stage, "status": "passed", "failures": [], "left_out": []}
if stage == "compile":
    sys.exit(3)
if stage == "correct":
    path.write_text(json.dumps({"cells": ["the first"]}))
    os.kill(os.getpid(), signal.SIGKILL)
if stage == "bench":
    path.write_text(json.dumps({"measurements": [1]}))
    time.sleep(100)
if stage == "parts":
    path.write_text(json.dumps(passed | {"status": "failed", "failures": ["a wrong key"]}))
    sys.exit(1)
path.write_text(json.dumps(passed | {"left_out": ["a case"]}))
"""


@pytest.mark.timeout(600)
def test_all_stages_run_simulated_where_only_torch_and_triton_are(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(BLOCKER)
    for folder in ("kernels", "flashhead_dist"):
        ignored = shutil.ignore_patterns("__pycache__", "corpus")
        shutil.copytree(KERNELS.parent / folder, tmp_path / folder, ignore=ignored)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    environment["PYTHONPATH"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "kernels/check_gpu.py", "--simulate", "--json", "--out", "out"],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["passed"] == STAGES
    assert summary["failed"] == summary["not_reached"] == []
    assert summary["simulated"] is True
    results = {name: json.loads((tmp_path / "out" / f"{name}.json").read_text()) for name in STAGES}
    assert all(result["simulated"] and not result["left_out"] for result in results.values())
    compiled = {kernel["kernel"] for kernel in results["compile"]["kernels"]}
    assert compiled >= {"dots_kernel", "candidates_kernel"}
    assert results["correct"]["tokens"] >= 20
    ways = {row["way"] for row in results["bench"]["measurements"]}
    assert ways >= {"flashhead", "flashhead_two_launches", "dense_fused", "dense_torch"}
    two = next(part for part in results["parts"]["parts"] if "two launches" in part["call"])
    assert {name.split(": ")[1] for name in two["kernels_us"]} >= {
        "dots_kernel", "candidates_kernel"
    }  # fmt: skip
    assert "all right" in results["exchange"]["runs"][0]["said"]
    assert "dense, batch 2" in results["graph"]["replayed"]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments of a run whose stages are those of FAKE."""
    (tmp_path / "check_stages.py").write_text(FAKE)
    monkeypatch.setattr(check_gpu, "_HERE", tmp_path)
    monkeypatch.setattr(check_gpu, "_GRACE_S", 0.5)
    return ["--simulate", "--out", str(tmp_path / "out")]


def read(tmp_path: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((tmp_path / "out" / f"{name}.json").read_text())
    return found


def test_a_stage_that_fails_crashes_or_hangs_stops_no_other(
    tmp_path: Path, fake: list[str], capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(check_gpu, "_LEAST_S", 0.5)
    stages = "compile,correct,parts,graph"
    assert check_gpu.main([*fake, "--stages", stages]) == 1
    said = capsys.readouterr().out
    assert "SIMULATED" in said
    assert "failed: compile, correct, parts" in said
    assert "passed: graph" in said
    assert "1 of its cases" in said
    assert "exit code 3" in read(tmp_path, "compile")["failures"][0]
    killed = read(tmp_path, "correct")
    assert killed["cells"] == ["the first"]
    assert "exit code -9" in killed["failures"][0]
    # A stage that hangs takes what is left of the budget, and the next is not reached.
    assert check_gpu.main([*fake, "--stages", "graph,bench", "--budget-s", "2", "--json"]) == 1
    hung = read(tmp_path, "bench")
    assert hung["measurements"] == [1]
    assert "had not ended" in hung["failures"][0]
    monkeypatch.setattr(check_gpu, "_LEAST_S", 100)
    capsys.readouterr()
    assert check_gpu.main([*fake, "--stages", "graph,bench", "--budget-s", "2", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["passed"], summary["not_reached"]) == ([], ["bench", "graph"])
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_a_summary_and_no_process(
    tmp_path: Path, number: signal.Signals
) -> None:
    (tmp_path / "check_stages.py").write_text(FAKE)
    script = (
        "import check_gpu, pathlib, sys\n"
        f"check_gpu._HERE = pathlib.Path({str(tmp_path)!r})\n"
        "sys.exit(check_gpu.main(sys.argv[1:]))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, "--simulate", "--stages", "bench,graph", "--out", "out"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(KERNELS)}, start_new_session=True,
    )  # fmt: skip
    deadline_s = time.monotonic() + 60
    while not (tmp_path / "out" / "bench.json").exists():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(30) == 130
    summary = read(tmp_path, "summary")
    assert summary["interrupted"] is True
    assert summary["not_reached"] == ["bench", "graph"]
    assert read(tmp_path, "bench") == {"measurements": [1]}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--stages", "compile,fast"], "'fast': give some of compile,correct"),
        (["--budget-s", "0"], "give more than 0"),
        (["--out", "file/out"], "cannot be made"),
    ],
)
def test_mistakes_end_in_one_sentence_and_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    arguments: list[str], said: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    assert check_gpu.main(["--simulate", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_without_a_gpu_it_names_the_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert check_gpu.main([]) == 2
    assert "--simulate" in capsys.readouterr().err
