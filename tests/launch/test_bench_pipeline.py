"""The pipeline benchmark as a person runs it, on a model of five small layers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
VOCAB = 97


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "the": 1, "of": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(folder)
    return folder


def run(
    cache: Path, num_ranks: int, model: Path, *arguments: str
) -> subprocess.CompletedProcess[str]:
    given = ["--model", str(model), "--head", "dense_local_max", "--device", "cpu"]
    given += ["--new-tokens", "3", "--prompt-tokens", "4", "--repeats", "1", *arguments]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    script = str(LAUNCH / "bench_pipeline.py")
    start = [*torchrun, script] if num_ranks > 1 else [script]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "FLASHHEAD_CACHE": str(cache)}
    return subprocess.run(
        [sys.executable, *start, *given],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_every_schedule_is_shown_beside_its_theory(model: Path, tmp_path: Path) -> None:
    done = run(tmp_path, 2, model, "--micro-batches", "1,3", "--layers-per-stage", "2,3", "--json")
    assert done.returncode == 0, done.stderr
    assert "continuous" in done.stdout
    rows = json.loads(done.stdout.splitlines()[-1])["results"]
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


def test_stages_that_sleep_are_called_simulated(model: Path, tmp_path: Path) -> None:
    done = run(tmp_path, 2, model, "--micro-batches", "2", "--sleep-ms", "9,2", "--json")
    assert done.returncode == 0, done.stderr
    assert "SIMULATED COMPUTE" in done.stdout
    for row in json.loads(done.stdout.splitlines()[-1])["results"]:
        slow, fast = row["stage_step_ms"]
        assert slow >= 9
        assert fast >= 2


def test_mistakes_are_one_sentence(model: Path, tmp_path: Path) -> None:
    for arguments, sentence in [
        ([], "error: a pipeline needs 2 stages or more, got pp_size 1: leave it out"),
        (["--micro-batches", "0,1"], "error: --micro-batches holds 0: give 1 or more"),
        (["--sleep-ms", "5,5"], "error: --sleep-ms 5,5 does not give each of 1 stages a time"),
    ]:
        done = run(tmp_path, 1, model, *arguments)
        assert done.returncode == 2
        assert sentence in done.stderr
        assert "Traceback" not in done.stderr
