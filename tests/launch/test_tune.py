"""launch/tune.py on a made-up model: measures, resumes, chooses, builds, applies, and refuses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest

from flashhead_dist.index import load_manifest, load_shard
from flashhead_dist.tune.simulate import Simulator
from tests.launch.scripts import load_script

LAUNCH = Path(__file__).parents[2] / "launch"
RUN = ["--synthetic", "2048,64", "--groups", "16", "--quick", "--threads", "1", "--skip-plots"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHHEAD_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tune() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(LAUNCH))
        yield load_script("tune")


def run(tune: ModuleType, capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, object]:
    assert tune.main([*RUN, "--json", *arguments]) == 0
    document: dict[str, object] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return document


def test_measures_builds_resumes_and_applies(
    tune: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, index = tmp_path / "out", tmp_path / "index"
    common = ["--out", str(out), "--iters", "2"]
    document = run(tune, capsys, *common, "--max-bytes", "0.19", "--build", str(index))
    chosen = document["chosen"]
    assert isinstance(chosen, dict)
    assert document["synthetic"] is True
    front = pd.read_csv(out / "front.csv")
    assert set(front["measured"]) <= {True, False}
    # A point that no head runs never has a time.
    assert front[~front["measured"]].get("median_us", pd.Series(dtype=float)).isna().all()
    assert (front[front["measured"]]["median_us"] > 0).all()

    manifest = load_manifest(index)
    assert manifest.margin_by_share
    load_shard(index)
    assert manifest.num_probes == chosen["probes_per_group"] * 16
    assert manifest.alpha == chosen["alpha"]
    assert manifest.calibration["tuning"]["chosen"]["bytes_share"] == chosen["bytes_share"]
    # What was simulated is what the index does, but for pins chosen anew when it is built.
    assert manifest.fidelity["top1_agreement"] == pytest.approx(chosen["top1"], abs=0.01)

    def refuse(*_: object) -> None:
        raise AssertionError("measured twice")

    monkeypatch.setattr(Simulator, "ranks", refuse)
    other = run(tune, capsys, *common, "--target", "worst=0.9", "--apply", str(index))
    again = other["chosen"]
    assert isinstance(again, dict)
    assert again["bytes_share"] < chosen["bytes_share"]
    changed = load_manifest(index)
    assert changed.num_probes == again["probes_per_group"] * 16
    # Margins of other probes would make flashhead_escalate look again at the wrong rows.
    assert changed.margin_by_share == {}
    assert changed.calibration["tuning"]["target"] == "at least 90 % in the worst source"
    load_shard(index)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--target", "worst=2"], "worst=2"),
        (["--max-bytes", "0"], "--max-bytes"),
        (["--iters", "0"], "--iters"),
        (["--build", "a", "--apply", "b"], "--build"),
        (["--hold-out", "klingon"], "klingon"),
        (["--only", "("], "is no pattern"),
        (["--only", "S99"], "finds no family"),
        (["--mark", "published=none.json", "--skip-times"], "none.json"),
        (["--target", "worst=1,overall=1", "--skip-times"], "no setting reaches"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(
    tune: ModuleType,
    arguments: list[str],
    named: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert tune.main([*RUN, "--out", str(tmp_path / "out"), *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("error: ")
    assert named in lines[-1]
