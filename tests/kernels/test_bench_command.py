"""kernels/bench.py as a command: its files, its JSON line, its mistakes, and how it ends early."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import bench
import bench_cell
import bench_ways as ways

SCRIPT = Path(__file__).parents[2] / "kernels" / "bench.py"
TINY = ["--device", "cpu", "--synthetic", "2048,64", "--iters", "2", "--batch-sizes", "1,2"]


def test_a_tiny_run_end_to_end(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *TINY, "--tp-sizes", "1,128", "--out", tmp_path, "--json"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "(CPU" in done.stdout
    assert "ONE rank's work" in " ".join(done.stdout.split())
    document = json.loads(done.stdout.splitlines()[-1])
    environment = document["environment"]
    assert environment["complete"] is True
    assert environment["operations"] == "flashhead_kernels.cpu"
    assert "not how fast a GPU is" in environment["timing"]
    cells = {(r["tp_size"], r["batch_size"]) for r in document["results"]}
    assert cells == {(1, 1), (1, 2), (128, 1), (128, 2)}
    assert {verdict["met"] for verdict in document["verdicts"]} == {None}
    names = {"kernels.csv", "kernels.md", "environment.json"}
    assert {path.name for path in tmp_path.iterdir()} == names
    frame = pd.read_csv(tmp_path / "kernels.csv")
    assert frame["median_us"].tolist() == [r["median_us"] for r in document["results"]]
    assert frame["device"].str.contains("CPU").all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_tiny_run_on_a_gpu(tmp_path: Path) -> None:
    arguments = ["--synthetic", "32768,640", "--tp-sizes", "1,8", "--batch-sizes", "1,3,32"]
    assert bench.main([*arguments, "--iters", "3", "--out", str(tmp_path)]) == 0
    frame = pd.read_csv(tmp_path / "kernels.csv")
    assert set(frame["device"]) == {torch.cuda.get_device_name()}
    graphs = frame[frame["timing"] == "CUDA events, graph replay"]
    assert {ways.FLASHHEAD, ways.DENSE_FUSED, ways.DENSE_TORCH} <= set(graphs["way"])
    assert (frame["num_copies"] > 2).all()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--iters", "0"], "--iters holds 0: give 1 or more"),
        (["--tp-sizes", "1,0"], "--tp-sizes holds 0: give 1 or more"),
        (["--tp-sizes", "129"], "--tp-sizes holds 129: give 128 or less"),
        (["--batch-sizes", "-1"], "--batch-sizes holds -1: give 1 or more"),
        (["--models", "gpt"], "--models holds 'gpt': give some of gemma-3-270m,"),
        (["--synthetic", "4096"], "--synthetic 4096 is not V,D: give two integers"),
        (["--synthetic", "100,64"], "vocabulary of 100: give 2048 or more"),
        (["--synthetic", "4096,65"], "hidden size of 65: give a multiple of 64"),
        (["--synthetic", "4096,64", "--models", "qwen3-1.7b"], "exclude each other: give one"),
    ],
)
def test_mistakes_end_in_one_sentence_and_code_2(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], said: str
) -> None:
    assert bench.main(["--device", "cpu", "--out", str(tmp_path / "out"), *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ")
    assert said in line
    assert not (tmp_path / "out").exists()


def test_without_a_gpu_it_names_the_remedy(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main([]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: torch finds no CUDA device")
    assert "--device cpu" in line


def test_a_folder_that_cannot_be_made_is_refused_before_anything_is_timed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    assert bench.main([*TINY, "--out", str(tmp_path / "file" / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot be made" in line
    assert "give another --out" in line


@pytest.mark.parametrize(
    ("ending", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "error: interrupted"),
        (torch.OutOfMemoryError("CUDA out of memory"), 2, "out of memory: give fewer"),
    ],
)
def test_what_was_measured_is_written_however_the_run_ends(
    ending: BaseException,
    code: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    measured = bench_cell.measure_shard

    def cut_short(*given: Any) -> Iterator[bench_cell.Measurement]:
        for number, one in enumerate(measured(*given)):
            if number == 4:  # the first cell's four ways are through
                raise ending
            yield one

    monkeypatch.setattr(bench, "measure_shard", cut_short)
    assert bench.main([*TINY, "--tp-sizes", "128", "--out", str(tmp_path)]) == code
    assert said in capsys.readouterr().err
    frame = pd.read_csv(tmp_path / "kernels.csv")
    assert frame["batch_size"].tolist() == [1] * 4
    assert "INCOMPLETE" in (tmp_path / "kernels.md").read_text()


def test_a_wrong_token_ends_in_code_1_after_everything_else_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*given: Any) -> ways.Checked:
        raise ways.WrongResultError("flashhead gave token 7")

    monkeypatch.setattr(ways, "_check_flashhead", refuse)
    assert bench.main([*TINY, "--tp-sizes", "128", "--out", str(tmp_path), "--json"]) == 1
    captured = capsys.readouterr()
    assert captured.err.count("flashhead gave token 7") == 2
    document = json.loads(captured.out.splitlines()[-1])
    assert len(document["failures"]) == 2
    assert {r["way"] for r in document["results"]} == {
        ways.DENSE_FUSED, ways.DENSE_TORCH, ways.PUBLISHED_EAGER
    }  # fmt: skip
    page = (tmp_path / "kernels.md").read_text()
    assert "INCOMPLETE" not in page
    assert "- FAILED: flashhead at" in page


def test_a_failing_kernel_keeps_its_error_and_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = bench_cell.measure_shard

    def fails(*given: Any) -> Iterator[bench_cell.Measurement]:
        yield from measured(*given)
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(bench, "measure_shard", fails)
    with pytest.raises(RuntimeError, match="no kernel image"):
        bench.main([*TINY, "--tp-sizes", "128", "--out", str(tmp_path)])
    assert "INCOMPLETE" in (tmp_path / "kernels.md").read_text()
    assert len(pd.read_csv(tmp_path / "kernels.csv")) == 8
