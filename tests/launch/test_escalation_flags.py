"""--escalate-below and --escalate-to of scale.py: what they change, what records say, mistakes.

Mutated to see each fail: the plan's escalation not handed to the heads, the threshold left out of
the record.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from flashhead_dist.index import load_manifest
from tests.launch.ground import Ground, Refused

HEADS = ("--heads", "flashhead,flashhead_escalate")


@pytest.fixture
def run(
    scale: ModuleType, ground: Ground, capsys: pytest.CaptureFixture[str]
) -> Callable[..., dict[str, dict[str, Any]]]:
    """Two heads in one small run; the record of each."""

    def measure(*arguments: str) -> dict[str, dict[str, Any]]:
        capsys.readouterr()
        quiet = ("--runs-dir", str(ground.scratch), "--skip-plots", "--json")
        assert scale.main(ground.arguments(*HEADS, *quiet, *arguments)) == 0
        document = json.loads(capsys.readouterr().out.splitlines()[-1])
        return {record["head"]: record for record in document["records"]}

    return measure


def test_the_threshold_decides_which_rows_look_again(
    run: Callable[..., dict[str, dict[str, Any]]], ground: Ground
) -> None:
    clusters = load_manifest(ground.index).num_clusters
    every = run("--escalate-below", "1e9")
    wide = run("--escalate-below", "1e9", "--escalate-to", str(clusters))
    never = run("--escalate-below=-1e9")
    plain = every["flashhead"]["top1_agreement"]
    assert plain < 1
    assert every["flashhead_escalate"]["top1_agreement"] == 1
    assert wide["flashhead_escalate"]["top1_agreement"] == 1
    assert never["flashhead_escalate"]["top1_agreement"] == plain
    assert every["flashhead_escalate"]["escalate_below"] == 1e9
    assert run()["flashhead_escalate"]["escalate_below"] is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--escalate-below", "0"], "flashhead_escalate, which is not among flashhead: name it"),
        ([*HEADS, "--escalate-below", "inf"], "--escalate-below is inf: give a finite number"),
        ([*HEADS, "--escalate-to", "9"], "needs a threshold: give --escalate-below too"),
        ([*HEADS, "--escalate-below", "0", "--escalate-to", "0"], "--escalate-to is 0: give 1"),
        (
            [*HEADS, "--escalate-below", "0", "--escalate-to", "8"],
            "8 probes must lie above the head's own 8",
        ),
    ],
)
def test_a_mistake_is_one_sentence(
    arguments: list[str], said: str, refused: Refused, ground: Ground
) -> None:
    assert said in refused(*ground.arguments(*arguments))
