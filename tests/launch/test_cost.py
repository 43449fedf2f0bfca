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

from flashhead_dist.heads.base import HeadShape
from flashhead_dist.heads.registry import head_cost
from flashhead_dist.index import IndexOptions, build_index, load_manifest
from flashhead_dist.models import open_model
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


@pytest.fixture(scope="module")
def command() -> Iterator[ModuleType]:
    """The script as a module, since a process for each mistake takes seconds."""
    sys.path.insert(0, str(LAUNCH))
    try:
        yield importlib.import_module("cost")
    finally:
        sys.path.remove(str(LAUNCH))


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
    expected = head_cost("flashhead", shape, load_system("h100-infiniband"), tp_size=8)
    assert rows[-1]["total_s"] == expected.total_s
    assert f"{expected.total_s * 1e6:,.1f}" in done.stdout


def test_systems_and_sources_are_listed(
    command: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in list_systems())
    assert command.main(["--system", "l40-ethernet", "--sources"]) == 0
    sources = capsys.readouterr().out
    for word in ("data sheet", "assumed", "derived", "ethernet_100g_x1, 1024 ranks", "https://"):
        assert word in sources


def test_an_index_takes_the_place_of_a_shape(
    command: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model = open_model(synthetic="3000,64", cache_dir=tmp_path)
    index = build_index(
        model,
        IndexOptions(num_groups=8, alpha=0.5, cluster_size=2),
        calibration=None,
        test=None,
        out=tmp_path / "index",
        device="cpu",
        progress=False,
    )
    given = ["--system", "h100-infiniband", "--index", str(index), "--tp-sizes", "2", "--json"]
    assert command.main(given) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["costs"]
    expected = head_cost(
        "flashhead",
        HeadShape.of_index(load_manifest(index)),
        load_system("h100-infiniband"),
        tp_size=2,
    )
    assert rows[-1]["read_bytes"] == expected.read_bytes


def test_a_mistake_ends_with_2_and_one_sentence() -> None:
    done = cost("--system", "h1000")
    assert done.returncode == 2
    assert "no system named 'h1000'" in done.stderr
    assert len(done.stderr.splitlines()) == 1


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
