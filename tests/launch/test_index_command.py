"""launch/build_index.py as a user runs it: output, exit codes, and nothing left by a mistake."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "launch" / "build_index.py"
MODEL = ("--synthetic", "600,64", "--groups", "4")
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return os.environ | {"FLASHHEAD_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def run(tmp_path: Path, environment: dict[str, str]) -> Run:
    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, SCRIPT, *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=200,
        )

    return command


def _document(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def _refused(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1, done.stderr
    return said[0]


def test_an_index_is_built_kept_described_and_noticed_when_damaged(
    run: Run, tmp_path: Path
) -> None:
    out = tmp_path / "mine"
    options = ("--out", str(out), "--cluster-size", "8", "--num-probes", "8", "--pin", "5,6")
    built = run(*MODEL, *options, "--json")
    document = _document(built)
    assert document["path"] == str(out)
    assert (document["vocab_size"], document["cluster_size"], document["num_probes"]) == (600, 8, 8)
    assert document["synthetic"] is True
    assert 0 < document["fidelity"]["top1_agreement"] <= 1
    assert sorted(path.name for path in out.iterdir()) == ["index.safetensors", "manifest.json"]

    inspected = run("--inspect", str(out))
    assert inspected.returncode == 0
    for said in ("synthetic", "600", "intact", document["index_hash"][:8]):
        assert said in inspected.stdout
    assert _document(run("--inspect", str(out), "--json")) == document

    stored = bytearray((out / "index.safetensors").read_bytes())
    assert "--force" in _refused(run(*MODEL, *options))
    assert (out / "index.safetensors").read_bytes() == stored
    stored[-1] ^= 1
    (out / "index.safetensors").write_bytes(stored)
    assert str(out / "index.safetensors") in _refused(run("--inspect", str(out)))
    again = _document(run(*MODEL, *options, "--force", "--json"))
    assert again["index_hash"] == document["index_hash"]
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == ["mine"]


def test_without_out_the_index_goes_to_the_cache_and_stays(run: Run, tmp_path: Path) -> None:
    first = _document(run(*MODEL, "--json"))
    assert Path(first["path"]).is_relative_to(tmp_path / "cache")
    second = run(*MODEL, "--json")
    assert _document(second) == first
    assert "--force" in second.stderr
    other = _document(run(*MODEL, "--json", "--seed", "1"))
    assert other["path"] != first["path"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--cluster-size", "3"), "cluster size 3"),
        (("--num-probes", "0"), "0 probes"),
        (("--groups", "0"), "0 probing groups"),
        (("--alpha", "nan"), "alpha nan"),
        (("--pin", "600"), "pinned token 600"),
        (("--threads", "-3"), "--threads is -3"),
        (("--out", "/proc/nowhere/index"), "/proc/nowhere/index"),
        (("--out", "x", "--calibration", "no.safetensors"), "no.safetensors"),
        (("--inspect", "no_such_index"), "no_such_index"),
        (("--out", "x", "--hold-out", "fr"), "--hold-out needs texts"),
    ],
)
def test_a_mistake_is_a_sentence_and_leaves_nothing(
    run: Run, tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    message = _refused(run(*MODEL, *arguments))
    assert said in message
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == []


def test_control_c_leaves_nothing(tmp_path: Path, environment: dict[str, str]) -> None:
    process = subprocess.Popen(
        [sys.executable, SCRIPT, "--synthetic", "60000,64", "--out", "mine"],
        cwd=tmp_path,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        # A test run in the background of a shell would hand on that it ignores interrupts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert process.stderr is not None
        assert process.stderr.readline()  # progress, after two seconds
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
        code = process.wait(60)
    finally:
        process.kill()
    assert code == 130, rest
    assert "interrupted" in rest
    assert "Traceback" not in rest
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == []
