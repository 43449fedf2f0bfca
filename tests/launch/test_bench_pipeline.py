"""The pipeline benchmark as a person runs it, on a model of five small layers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from flashhead_dist.integrations.pipeline_stage import PipelineStage, StageInput
from tests.integrations.small_models import small_model
from tests.launch.scripts import load_script

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
SCRIPT = LAUNCH / "bench_pipeline.py"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    small_model().save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "the": 1, "of": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(folder)
    return folder


def run(cache: Path, model: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command on two ranks."""
    given = ["--model", str(model), "--head", "dense_local_max", "--device", "cpu"]
    given += ["--new-tokens", "3", "--prompt-tokens", "4", "--repeats", "1", *arguments]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "FLASHHEAD_CACHE": str(cache)}
    return subprocess.run(
        [sys.executable, *torchrun, str(SCRIPT), *given],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_every_schedule_is_shown_beside_its_theory(model: Path, tmp_path: Path) -> None:
    given = ["--micro-batches", "1,3", "--layers-per-stage", "2,3", "--run-dir", str(tmp_path)]
    (tmp_path / "records.jsonl").touch()
    done = run(tmp_path, model, *given, "--json")
    assert done.returncode == 0, done.stderr
    assert "continuous" in done.stdout
    document = json.loads(done.stdout.splitlines()[-1])
    assert json.loads((tmp_path / "pipeline.json").read_text()) == document
    rows = document["results"]
    assert [(row["micro_batches"], row["schedule"]) for row in rows] == [
        (1, "continuous"),
        (1, "flushed"),
        (3, "continuous"),
        (3, "flushed"),
    ]
    # p 2, 3 steps: by hand from the slots of the schedule, of which each stage works in m n.
    assert [row["formula_bubble"] for row in rows] == pytest.approx([1 / 2, 1 / 2, 1 / 10, 1 / 4])
    for row in rows:
        assert len(row["stage_idle_shares"]) == 2
        assert 0 <= row["ideal_bubble"] < 1


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, for one rank."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.syspath_prepend(str(LAUNCH))
    return load_script("bench_pipeline")


def test_a_stage_that_sleeps_does_so_at_every_pass(bench: ModuleType) -> None:
    stage = PipelineStage(lambda: bench.sleeping_model(3, 20), 1, 3)
    start_s = time.perf_counter()
    for _ in range(3):
        stage(
            StageInput(torch.zeros(1, 2, stage.hidden_size), None, stage.new_cache(recording=False))
        )
    assert time.perf_counter() - start_s >= 0.06


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "error: a pipeline needs 2 stages or more, got pp_size 1: leave it out"),
        (["--micro-batches", "0,1"], "error: --micro-batches holds 0: give 1 or more"),
        (["--sleep-ms", "5"], "error: a pipeline needs 2 stages or more"),
        (["--sleep-ms", "5,5"], "error: --sleep-ms 5,5 does not give each of 1 stages a time"),
        (["--pp-size", "2"], "error: --pp-size 2 does not divide the 1 ranks"),
        (["--run-dir", "nowhere"], "error: --run-dir nowhere holds no records.jsonl: name a run"),
        (["--head", "sparse"], "error: there is no head named 'sparse'"),
    ],
)
def test_mistakes_are_one_sentence(
    bench: ModuleType,
    model: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    sentence: str,
) -> None:
    given = ["--model", str(model), "--head", "dense_local_max", "--device", "cpu", *arguments]
    assert bench.main(given) == 2
    assert sentence in capsys.readouterr().err
