"""launch/calibrate.py as a user runs it: a system file, its points and a picture, or a sentence."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from flashhead_dist.errors import UserError
from flashhead_dist.heads.base import HeadShape
from flashhead_dist.heads.registry import head_cost
from flashhead_topology.systems import load_system
from tests.launch.ground import LAUNCH
from tests.launch.scripts import load_script

SCRIPT = str(LAUNCH / "calibrate.py")


def run(folder: Path, num_ranks: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(num_ranks)]
    return subprocess.run(
        [sys.executable, *(torchrun if num_ranks > 1 else []), SCRIPT, *arguments],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_two_ranks_become_a_system_file(tmp_path: Path) -> None:
    done = run(
        tmp_path, 2, "--largest-bytes", "65536", "--point-seconds", "0.05", "--out", "lab.yaml",
        "--ranks", "16", "--fit", "p10", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    system = load_system(tmp_path / "lab.yaml")
    (level,) = system.levels
    assert (system.name, level.name, level.ranks, system.algorithm) == (
        "lab", "host", 16, "gloo_ring",
    )  # fmt: skip
    # A message takes longer than a system call, and less than a second.
    assert 1e-6 < level.alpha_s + level.base_s < 1
    error = level.sources["alpha_s"].relative_error
    assert level.sources["alpha_s"].kind == "measured"
    assert "p10" in level.sources["alpha_s"].source
    assert 1e8 < system.memory_bandwidth_bytes_per_s < 1e13
    assert system.max_ranks == 16
    # What is written is what a projection takes.
    shape = HeadShape(vocab_size=32000, hidden_size=64)
    assert head_cost("dense_gather", shape, system, tp_size=16).exchange_s > 0

    with (tmp_path / "lab.csv").open() as file:
        rows = list(csv.DictReader(file))
    document = json.loads(done.stdout.splitlines()[-1])
    assert len(rows) == len(document["points"]) == 3 * 6
    assert {int(row["payload_bytes"]) for row in rows} == {8, 64, 512, 4096, 32768, 65536}
    assert document["mean_relative_error"]["host"] == pytest.approx(error, abs=1e-3)
    for row in rows:
        assert 0 < float(row["p10_us"]) <= float(row["median_us"]) <= float(row["p90_us"])
        fitted, measured = float(row["fitted_us"]), float(row["p10_us"])
        assert float(row["relative_error"]) == pytest.approx(fitted / measured - 1)
    assert (tmp_path / "lab.png").read_bytes()[:4] == b"\x89PNG"


@pytest.fixture
def two_ranks(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module that takes itself for the first of two ranks."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.syspath_prepend(str(LAUNCH))
    return load_script("calibrate")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--out", "lab"], "--out is lab: give a name that ends in .yaml"),
        (["--largest-bytes", "8"], "--largest-bytes is 8: give 64 or more"),
        (["--point-seconds", "nan"], "--point-seconds is nan: give more than 0"),
        (["--ranks", "1"], "--ranks is 1: give 2, as started, or more"),
        (["--fit", "mean"], "invalid choice: 'mean'"),
    ],
)
def test_what_cannot_be_is_told_in_one_sentence(
    two_ranks: ModuleType, arguments: list[str], sentence: str
) -> None:
    with pytest.raises(UserError, match=re.escape(sentence)):
        two_ranks._parse(arguments, two_ranks.World())


def test_one_rank_has_no_links(tmp_path: Path) -> None:
    done = run(tmp_path, 1)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: links need two ranks or more: start them with torchrun")
    assert done.stderr.count("\n") == 1


def test_a_file_that_is_there_is_kept(tmp_path: Path) -> None:
    kept = {"mine": 1}
    (tmp_path / "calibrated.yaml").write_text(yaml.safe_dump(kept))
    done = run(tmp_path, 2, "--largest-bytes", "64")
    assert done.returncode == 1  # torchrun's own code
    assert "error: calibrated.yaml is there already: give another name" in done.stderr
    assert done.stderr.count("exitcode  : 2 ") == 2
    assert yaml.safe_load((tmp_path / "calibrated.yaml").read_text()) == kept
    assert [path.name for path in tmp_path.iterdir()] == ["calibrated.yaml"]
