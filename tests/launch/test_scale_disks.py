"""Disks that are full or cannot be written: one sentence, code 2, and what was written stays."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest

from tests.launch.ground import Ground, Refused, sentence_of_two_ranks, torchrun_scale


@contextmanager
def _small_disk(folder: Path, options: str) -> Iterator[Path]:
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)],
        capture_output=True,
        text=True,
    )
    if mounted.returncode:
        pytest.skip(f"no small file system can be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a file system")


@pytest.mark.root
@needs_root
def test_disk_full_of_records(ground: Ground) -> None:
    with _small_disk(ground.scratch / "disk", "size=16k") as disk:
        batch_sizes = ("--batch-sizes", "1,2,3,4,5,6,7,8")
        code, stderr = torchrun_scale(*ground.arguments(*batch_sizes, "--runs-dir", str(disk)))
        (records,) = disk.glob("*/records.jsonl")
        lines = records.read_text().split("\n")[:-1]
    sentence = sentence_of_two_ranks(code, stderr)
    assert "No space left on device" in sentence
    assert str(records) in sentence
    assert lines
    assert [json.loads(line)["head"] for line in lines] == ["flashhead"] * len(lines)


@pytest.mark.root
@needs_root
def test_disk_full_of_plots(
    ground: Ground, scale: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with _small_disk(ground.scratch / "disk", "size=24k") as disk:
        assert scale.main(ground.arguments("--runs-dir", str(disk))) == 2
        (records,) = disk.glob("*/records.jsonl")
        assert records.read_text().count("\n") == 1
    captured = capsys.readouterr()
    (said,) = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert ".png (No space left on device)" in said
    assert "--runs-dir" in said


@pytest.mark.root
@needs_root
@pytest.mark.parametrize("head", ["flashhead", "dense_local_max"])
def test_disk_full_of_what_is_made_once(
    ground: Ground, refused: Refused, monkeypatch: pytest.MonkeyPatch, head: str
) -> None:
    """The cache takes neither the index nor, where none is needed, the dense head's answers."""
    with _small_disk(ground.scratch / "disk", "size=8k") as disk:
        monkeypatch.setenv("FLASHHEAD_CACHE", str(disk))
        sentence = refused("--synthetic", "500,64", "--heads", head, "--iters", "1")
    assert str(disk) in sentence
    assert "No space left on device" in sentence
    assert "free some space" in sentence


@pytest.mark.root
@needs_root
def test_runs_folder_on_a_read_only_disk(ground: Ground, refused: Refused) -> None:
    with _small_disk(ground.scratch / "disk", "ro") as disk:
        sentence = refused(*ground.arguments("--runs-dir", str(disk)))
    assert str(disk) in sentence
    assert "--runs-dir" in sentence
