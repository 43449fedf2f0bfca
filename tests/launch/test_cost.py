"""launch/cost.py as a user runs it."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from flashhead_topology.head_cost import HeadShape, step_cost
from flashhead_topology.systems import list_systems, load_system
from tests.launch.ground import LAUNCH


def cost(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, str(LAUNCH / "cost.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "Traceback" not in done.stderr
    return done


def test_a_step_is_told_by_part_and_called_projected() -> None:
    done = cost("--system", "h100-infiniband", "--tp-sizes", "1,8", "--json")
    assert done.returncode == 0, done.stderr
    assert "PROJECTED" in done.stdout
    rows = json.loads(done.stdout.splitlines()[-1])["costs"]
    assert [(row["head"], row["tp_size"]) for row in rows][-2:] == [
        ("flashhead", 1),
        ("flashhead", 8),
    ]
    shape = HeadShape.with_default_index(262_144, 640)
    expected = step_cost("flashhead", shape, load_system("h100-infiniband"), tp_size=8)
    assert rows[-1]["total_s"] == expected.total_s
    assert f"{expected.total_s * 1e6:,.1f}" in done.stdout


def test_systems_and_sources_are_listed() -> None:
    listed = cost("--list")
    assert listed.returncode == 0
    assert all(name in listed.stdout for name in list_systems())
    sources = cost("--system", "l40-ethernet", "--sources")
    assert sources.returncode == 0
    for word in ("data sheet", "assumed", "derived", "ethernet_100g_x1, 1024 ranks", "https://"):
        assert word in sources.stdout


def test_a_mistake_ends_with_2_and_one_sentence() -> None:
    done = cost("--system", "h1000")
    assert done.returncode == 2
    assert "no system named 'h1000'" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.fixture(scope="module")
def command() -> Iterator[ModuleType]:
    """The script as a module, since a process for each mistake takes seconds."""
    sys.path.insert(0, str(LAUNCH))
    try:
        yield importlib.import_module("cost")
    finally:
        sys.path.remove(str(LAUNCH))


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "no system is given"),
        (["--system", "none.yaml"], "cannot read none.yaml"),
        (["--system", "h100-ethernet", "--heads", "dense"], "no head named 'dense'"),
        (["--system", "h100-ethernet", "--tp-sizes", "2048"], "2048 ranks"),
        (["--system", "h100-ethernet", "--tp-sizes", "0"], "tp_size is 0"),
        (["--system", "h100-ethernet", "--shape", "5"], "--shape 5 is no vocabulary"),
        (["--system", "h100-ethernet", "--index", "nowhere"], "nowhere holds no index"),
        (["--system", "h100-ethernet", "--batch-size", "0"], "batch_size is 0"),
    ],
)
def test_every_mistake_is_one_sentence(
    command: ModuleType,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    complaint: str,
) -> None:
    assert command.main(arguments) == 2
    said = capsys.readouterr().err
    assert complaint in said
    assert len(said.splitlines()) == 1
