"""Every mistake of a user: one sentence that names the value and a remedy, and code 2 everywhere.

With one rank the command runs in this process; with several, under torchrun, where only what it
prints and how its ranks end can be seen.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file

from flashhead_dist.models import open_model
from tests.launch.ground import (
    VOCAB_SIZE,
    Ground,
    Refused,
    build_small,
    sentence_of_two_ranks,
    torchrun_scale,
)


@dataclass(frozen=True)
class Mistake:
    """Arguments that are refused, and what the sentence must hold: the value, then the remedy."""

    arguments: list[str]
    value: str
    remedy: str


def no_model(ground: Ground) -> Mistake:
    path = ground.scratch / "nowhere"
    return Mistake(ground.arguments(model=path), str(path), "name a Hugging Face folder")


def truncated_model(ground: Ground) -> Mistake:
    folder = ground.copy_of(ground.model)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    return Mistake(ground.arguments(model=folder), str(file), "again")


def index_of_other_weights(ground: Ground) -> Mistake:
    folder = ground.copy_of(ground.model)
    rows = torch.ones(VOCAB_SIZE, 64, dtype=torch.bfloat16)
    save_file({"lm_head.weight": rows}, folder / "model.safetensors")
    return Mistake(ground.arguments(model=folder), str(ground.index), "build")


def _damaged(ground: Ground, distance: int) -> Mistake:
    """The last tensor of the file is token_ids `[G, M, S]`, int32, 512 bytes a group."""
    folder = ground.copy_of(ground.index)
    file = folder / "index.safetensors"
    content = bytearray(file.read_bytes())
    content[-distance] ^= 1
    file.write_bytes(content)
    return Mistake(ground.arguments(index=folder), str(folder), "build")


def index_damaged_in_the_last_group(ground: Ground) -> Mistake:
    """Group 3, which rank 1 of 2 reads and rank 0 does not."""
    return _damaged(ground, 100)


def index_damaged_in_the_last_group_but_one(ground: Ground) -> Mistake:
    """Group 2, which rank 0 of 2 reads and rank 1 does not."""
    return _damaged(ground, 700)


def manifest_damaged(ground: Ground) -> Mistake:
    folder = ground.copy_of(ground.index)
    file = folder / "manifest.json"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return Mistake(ground.arguments(index=folder), str(folder), "build")


def no_index(ground: Ground) -> Mistake:
    path = ground.scratch / "none"
    return Mistake(ground.arguments(index=path), str(path), "launch/build_index.py")


def unknown_head(ground: Ground) -> Mistake:
    return Mistake(ground.arguments("--heads", "flashhed"), "'flashhed'", "dense_local_max")


def batch_of_nothing(ground: Ground) -> Mistake:
    return Mistake(ground.arguments("--batch-sizes", "1,0"), "holds 0", "1 or more")


def more_probes_than_clusters(ground: Ground) -> Mistake:
    return Mistake(ground.arguments("--num-probes", "100000"), "100000", "between 1 and")


def _not_finite(ground: Ground, value: float) -> Mistake:
    states = torch.randn(32, 64)
    states[7, 3] = value
    path = ground.scratch / "bad.safetensors"
    save_file({"hidden_states": states}, path)
    return Mistake(ground.arguments(hidden_states=path), "row 7", "recompute")


def hidden_states_with_nan(ground: Ground) -> Mistake:
    return _not_finite(ground, float("nan"))


def hidden_states_with_infinity(ground: Ground) -> Mistake:
    return _not_finite(ground, float("-inf"))


def hidden_states_of_another_width(ground: Ground) -> Mistake:
    path = ground.scratch / "narrow.safetensors"
    save_file({"hidden_states": torch.randn(4, 32)}, path)
    return Mistake(ground.arguments(hidden_states=path), "32", "64")


def runs_folder_that_is_a_file(ground: Ground) -> Mistake:
    path = ground.scratch / "file"
    path.write_text("")
    return Mistake(ground.arguments("--runs-dir", str(path)), str(path), "--runs-dir")


WITH_ANY_RANKS = (
    no_model,
    truncated_model,
    index_of_other_weights,
    index_damaged_in_the_last_group,
    index_damaged_in_the_last_group_but_one,
    manifest_damaged,
    no_index,
    unknown_head,
    batch_of_nothing,
    more_probes_than_clusters,
    hidden_states_with_nan,
    hidden_states_with_infinity,
    hidden_states_of_another_width,
    runs_folder_that_is_a_file,
)


def fewer_tokens_than_ranks(ground: Ground) -> Mistake:
    arguments = ["--synthetic", "1,64", "--heads", "dense_local_max"]
    return Mistake(arguments, "1 tokens, fewer than tp_size 2", "--tp-sizes of 1 or less")


def more_ranks_than_groups(ground: Ground) -> Mistake:
    model = open_model(str(ground.model))
    index = build_small(model, ground.scratch / "one_group", num_groups=1, num_probes=2)
    return Mistake(ground.arguments(index=index), "1 probing groups", "fewer ranks")


WITH_SEVERAL_RANKS = (
    index_damaged_in_the_last_group,
    index_damaged_in_the_last_group_but_one,
    unknown_head,
    hidden_states_with_nan,
    runs_folder_that_is_a_file,
    fewer_tokens_than_ranks,
    more_ranks_than_groups,
)
"""What all ranks, the first or another one find."""


def test_what_the_mistakes_are_made_in_works(
    scale: ModuleType, ground: Ground, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--runs-dir", str(ground.scratch), "--skip-plots", "--json")
    assert scale.main(ground.arguments(*more)) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [record["head"] for record in document["records"]] == ["flashhead"]


@pytest.mark.parametrize("make", WITH_ANY_RANKS)
def test_one_rank_refuses(
    make: Callable[[Ground], Mistake], ground: Ground, refused: Refused
) -> None:
    mistake = make(ground)
    sentence = refused(*mistake.arguments)
    assert mistake.value in sentence
    assert mistake.remedy in sentence


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--heads", ""], "no head named ''"),
        (["--batch-sizes", "one"], "one"),
        (["--tp-sizes", "2"], "tp size 2"),
        (["--tp-sizes", "0"], "tp size 0"),
        (["--iters", "0"], "--iters is 0"),
        (["--num-probes", "0"], "--num-probes is 0"),
        (["--threads-per-rank", "0"], "--threads-per-rank is 0"),
        (["--cell-seconds", "0"], "--cell-seconds is 0"),
        (["--cell-seconds", "nan"], "--cell-seconds is nan"),
        (["--seed", "-1"], "--seed is -1"),
        (["--alpha", "nan"], "alpha nan"),
        (["--dtype", "int3"], "int3"),
        (["--nonsense"], "--nonsense"),
        (["--synthetic", "12"], "12"),
        (["--model", "/nowhere/at/all.gguf"], "/nowhere/at/all.gguf"),
        (["--device", "cuda"], "cuda"),
    ],
)
def test_wrong_arguments(
    refused: Refused, arguments: list[str], named: str, ground: Ground
) -> None:
    if arguments[0] == "--device" and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    assert named in refused(*ground.arguments(), *arguments)


@pytest.fixture(scope="module")
def slow_first_rank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH that holds rank 0 up, so that any other rank fails before it."""
    folder = tmp_path_factory.mktemp("site")
    lines = ["import os, time", "time.sleep(1.5 * (os.environ.get('RANK') == '0'))"]
    (folder / "sitecustomize.py").write_text("\n".join(lines))
    return folder


@pytest.mark.parametrize("make", WITH_SEVERAL_RANKS)
def test_two_ranks_refuse_together(
    make: Callable[[Ground], Mistake], ground: Ground, slow_first_rank: Path
) -> None:
    mistake = make(ground)
    runs = ("--runs-dir", str(ground.scratch / "runs"))
    code, stderr = torchrun_scale(*runs, *mistake.arguments, python_path=slow_first_rank)
    sentence = sentence_of_two_ranks(code, stderr)
    assert mistake.value in sentence
    assert mistake.remedy in sentence
