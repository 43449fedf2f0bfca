"""launch/evaluate.py escalation: its figures against the head itself, its table, its mistakes.

Mutated to see each fail: a threshold a logit too high, caught counted over all states, the second
round's tokens taken where the first's stand, bytes of the share that was asked for.
"""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from flashhead_dist.evaluate.fidelity import evaluate_fidelity
from flashhead_dist.evaluate.truth import dense_truth
from flashhead_dist.heads.flashhead_escalate import Escalation
from flashhead_dist.heads.registry import build_head
from flashhead_dist.index import ensure_index, load_manifest
from flashhead_dist.models import open_model
from flashhead_dist.parallel import TensorParallel
from flashhead_dist.states import synthetic_hidden_states
from tests.launch.ground import LAUNCH
from tests.launch.scripts import load_script

MODEL = "3000,64"
COMMAND = ["escalation", "--synthetic", MODEL, "--max-states", "3000", "--num-probes", "128"]


@pytest.fixture(scope="module")
def evaluate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLASHHEAD_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.syspath_prepend(str(LAUNCH))
        yield load_script("evaluate")


def test_points_are_what_the_head_does(
    evaluate: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "points.csv"
    more = ("--then", "256", "all", "--shares", "0", "0.1", "0.3", "--csv", str(out), "--json")
    assert evaluate.main([*COMMAND, *more]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    points = found["points"]
    assert [point["second_probes"] for point in points] == [256] * 3 + [None] * 3
    with out.open() as file:
        assert len(list(csv.DictReader(file))) == 6
    model = open_model(None, synthetic=MODEL)
    states = synthetic_hidden_states(model)[1]
    step = -(-len(states) // 3000)
    states = states.subset(torch.arange(0, len(states), step))
    truth = dense_truth(model, states.states, progress=False)
    for point in points:
        if point["asked_share"] == 0:
            assert point["margin"] is None
            assert point["escalated_share"] == 0
            continue
        assert point["escalated_share"] == pytest.approx(point["asked_share"], abs=0.05)
        if point["asked_share"] == 0.1:
            continue
        head = build_head(
            "flashhead_escalate",
            tp=TensorParallel.single(),
            model=model,
            index_dir=ensure_index(model),
            num_probes=128,
            escalation=Escalation(margin=point["margin"], num_probes=point["second_probes"]),
        )
        measured = evaluate_fidelity(head, states, truth, progress=False)
        assert measured.top1_agreement == point["top1_agreement"]
        assert measured.bytes_share == pytest.approx(point["bytes_share"], rel=1e-6)
    never, _, most = points[3:]
    assert never["top1_agreement"] < most["top1_agreement"], "a second look gained nothing"
    gained = most["top1_agreement"] - never["top1_agreement"]
    missed = 1 - never["top1_agreement"]
    assert most["caught"] == pytest.approx(gained / missed), "all tokens scored: none missed again"


def test_what_is_written_is_what_the_head_then_takes(
    evaluate: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model = open_model(None, synthetic=MODEL)
    index = tmp_path / "index"
    shutil.copytree(ensure_index(model), index)
    more = ("--index", str(index), "--then", "256", "--shares", "0.1", "--write", "--json")
    assert evaluate.main([*COMMAND, *more]) == 0
    document = json.loads(capsys.readouterr().out)
    (point,) = document["points"]
    head = build_head("flashhead_escalate", tp=TensorParallel.single(), model=model,
                      index_dir=index, num_probes=128)  # fmt: skip
    assert head.escalation == Escalation(  # type: ignore[attr-defined]
        margin=point["margin"], num_probes=256, expected_share=point["escalated_share"]
    )
    manifest = load_manifest(index)
    assert manifest.index_hash == document["index_hash"]
    others = ["--num-probes", "256", "--then", "512"]
    assert evaluate.main([*COMMAND, *more[:-1], *others]) == 2
    assert "for the index's own 128 probes" in capsys.readouterr().err
    assert manifest.margin_by_share == load_manifest(ensure_index(model)).margin_by_share


def test_the_table_names_thresholds_and_costs(
    evaluate: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.main([*COMMAND, "--shares", "0", "0.2"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for word in ("never", "all", "hidden states: synthetic states"):
        assert word in printed


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (["--shares", "1.5"], "a share of 1.5 rows cannot escalate"),
        (["--then", "many"], "--then many is no number of clusters"),
        (["--then", "999999"], "must lie between 1 and the index's 768 clusters"),
        (["--write"], "give one of --shares, above 0"),
        (["--write", "--then", "256", "all"], "give one --num-probes and one --then"),
        (["--max-states", "0"], "--max-states is 0"),
    ],
)
def test_mistakes_are_named(
    evaluate: ModuleType,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    complaint: str,
) -> None:
    assert evaluate.main([*COMMAND, *more]) == 2
    assert complaint in capsys.readouterr().err
