"""launch/evaluate.py sampling and likelihood as a user runs them: documents and mistakes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "launch" / "evaluate.py"
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    cache = tmp_path_factory.mktemp("cache")

    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, SCRIPT, *arguments],
            env=os.environ | {"FLASHHEAD_CACHE": str(cache), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=200,
        )

    return command


def test_sampling_prints_one_document(run: Run) -> None:
    options = ("--synthetic", "600,64", "--draws", "500", "--states", "3", "--tp-sizes", "1", "3")
    done = run("sampling", *options, "--temperatures", "0.8", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["synthetic"]
    (found,) = document["temperatures"]
    assert (found["num_draws"], found["num_states"]) == (500, 3)
    assert found["equal_tp_sizes"] == [1, 3]
    # 500 draws of a few likely tokens: both distances are of the order of 1 / sqrt(500).
    assert 0 < found["total_variation"] < 0.1
    assert 0 < found["dense_total_variation"] < 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sampling", "--draws", "0"), "--draws is 0"),
        (("sampling", "--tp-sizes", "2"), "--tp-sizes must hold 1"),
        (("sampling", "--synthetic", "600,64", "--temperatures", "-1"), "temperature must be"),
        (("sampling", "--synthetic", "600,64", "--head", "faiss_ivf"), "does not sample"),
        (("likelihood", "--tokens", "0"), "--tokens is 0"),
        (("likelihood", "--texts", "nowhere.txt"), "nowhere.txt do not exist"),
    ],
)
def test_a_mistake_is_one_sentence(run: Run, arguments: tuple[str, ...], message: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert message in done.stderr
    assert "Traceback" not in done.stderr
