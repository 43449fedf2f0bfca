"""launch/generate.py: what it writes and prints, what it refuses, and how it ends too soon."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest

from flashhead_dist.models import open_model
from tests.launch.ground import LAUNCH, build_small
from tests.launch.scripts import load_script
from tests.launch.small_llama import save_small_llama

SCRIPT = LAUNCH / "generate.py"
CONTEXT = 96


@pytest.fixture(scope="module")
def generate() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(LAUNCH))
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            patch.delenv(name, raising=False)
        yield load_script("generate")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """Options that name a small Llama with a tokenizer of bytes, and an index of few probes."""
    scratch = tmp_path_factory.mktemp("generate")
    folder = scratch / "model"
    save_small_llama(folder, CONTEXT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLASHHEAD_CACHE", str(scratch / "cache"))
        index = build_small(open_model(str(folder)), scratch / "index", 4, num_probes=8)
        yield ["--model", str(folder), "--index", str(index), "--max-new-tokens", "20"]


@pytest.fixture
def run(
    generate: ModuleType, files: list[str], capsys: pytest.CaptureFixture[str]
) -> Callable[..., dict[str, Any]]:
    """One rank with --json, on prompts of different lengths, to its end; the document it prints."""

    def decode(*arguments: str) -> dict[str, Any]:
        capsys.readouterr()
        assert generate.main([*files, "--json", *arguments]) == 0
        document: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
        return document

    return decode


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("Once upon a time\n\nabc\nA longer line, of more bytes than that\n")
    return path


def test_heads_take_turns_and_lossless_text_is_the_dense_heads(
    run: Callable[..., dict[str, Any]], prompts: Path
) -> None:
    found = run("--compare", "--lossless", "5", "--prompts", str(prompts))
    labels = ["dense_local_max", "flashhead", "flashhead --lossless 5"]
    assert list(found["texts"]) == labels
    dense, retrieved, checked = (found["texts"][label] for label in labels)
    assert [len(texts) for texts in found["texts"].values()] == [3, 3, 3]
    assert checked == dense
    # Few probes of random rows: or the line above would show nothing.
    assert retrieved != dense
    assert found["checks"]["flashhead --lossless 5"]["rollbacks"] > 0
    assert found["identical_tokens_share"]["flashhead --lossless 5"] == 1
    assert 0 < found["identical_tokens_share"]["flashhead"] < 1
    tpot = found["tpot_ms"]
    for label in labels:
        assert found["tpot_ratio"][label] == pytest.approx(tpot[labels[0]] / tpot[label])
        assert 0 < found["head_share"][label] < 1


def test_a_batch_decodes_each_prompt_as_alone(
    run: Callable[..., dict[str, Any]], prompts: Path
) -> None:
    alone = run("--prompts", str(prompts), "--head", "dense_local_max")
    batch = run("--prompts", str(prompts), "--head", "dense_local_max", "--batch-size", "3")
    assert batch["texts"] == alone["texts"]


def test_sampling_is_repeated_by_its_seed_and_confirmed_by_the_same_noise(
    run: Callable[..., dict[str, Any]], prompts: Path
) -> None:
    sampled = ["--prompts", str(prompts), "--temperature", "1", "--ignore-eos"]
    one = run(*sampled, "--seed", "1", "--compare", "--lossless", "4")
    dense, _, checked = one["texts"].values()
    assert checked == dense
    assert run(*sampled, "--seed", "1")["texts"]["flashhead"] == one["texts"]["flashhead"]
    assert run(*sampled, "--seed", "2")["texts"]["flashhead"] != one["texts"]["flashhead"]


def test_a_threshold_of_escalation_takes_every_row_or_none(
    run: Callable[..., dict[str, Any]], prompts: Path
) -> None:
    """Fails where the engine builds its heads without the threshold."""
    heads = ["--prompts", str(prompts), "--head", "dense_local_max,flashhead,flashhead_escalate"]
    every = run(*heads, "--escalate-below", "1e9")["texts"]
    never = run(*heads, "--escalate-below=-1e9")["texts"]
    assert every["flashhead_escalate"] == every["dense_local_max"]
    assert never["flashhead_escalate"] == every["flashhead"] != every["dense_local_max"]


def test_text_is_streamed_and_written(
    generate: ModuleType, files: list[str], prompts: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "texts.jsonl"
    assert generate.main([*files, "--prompts", str(prompts), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["prompt"] for line in written] == [0, 1, 2]
    for line in written:
        assert line["text"]
        assert line["text"] in printed
    assert "=== prompt 2: abc" in printed
    assert "TPOT" in printed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tp-size", "2"], "needs 2 ranks, but 1 started"),
        (["--pp-size", "0"], "--pp-size is 0: give 1 or more"),
        (["--head", "nosuch"], "no head named 'nosuch'"),
        (["--top-k", "5"], "give --temperature too"),
        (["--temperature", "-1"], "temperature -1.0"),
        (["--micro-batches", "2"], "--micro-batches are in flight over pipeline stages"),
        (["--layers-per-stage", "1,3"], "splits pipeline stages"),
        (["--prompts", "nosuch.txt"], "nosuch.txt cannot be read"),
        (["--prompt", "a" * CONTEXT], f"more than the model's context of {CONTEXT}"),
        (["--prompt", ""], "prompt 1 has no tokens"),
        (["--index", "nowhere"], "nowhere"),
        (["--head", "dense_gather", "--temperature", "1"], "does not sample"),
        (["--temperature", "1", "--top-k", "200"], "top_k 200 is more than the"),
        (["--prompt", "abc", "--out", "no/such/folder/x"], "cannot be written"),
        (["--model", "nowhere"], "nowhere"),
        (["--escalate-below", "0"], "flashhead_escalate, which is not among flashhead"),
        (["--nosuch"], "unrecognized arguments: --nosuch"),
    ],
)
def test_mistakes_are_said_in_a_sentence(
    generate: ModuleType, files: list[str], arguments: list[str], said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert generate.main([*files, *arguments]) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, captured.err
    assert said in lines[0]
    assert "Traceback" not in captured.err


def torchrun(ranks: int, *arguments: str, cwd: Path) -> subprocess.Popen[str]:
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return subprocess.Popen(
        [sys.executable, *start, str(SCRIPT), *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        start_new_session=True,
    )


def test_two_stages_of_two_ranks_write_what_one_rank_writes(
    run: Callable[..., dict[str, Any]], files: list[str], prompts: Path, tmp_path: Path
) -> None:
    options = ["--prompts", str(prompts), "--compare", "--lossless", "5"]
    alone = run(*options)
    stages = ["--pp-size", "2", "--layers-per-stage", "3,1"]
    job = torchrun(4, *files, *options, *stages, "--json", cwd=tmp_path)
    out, err = job.communicate(timeout=200)
    assert job.returncode == 0, err
    found = json.loads(out.splitlines()[-1])
    assert found["texts"] == alone["texts"]
    assert "OVERSUBSCRIBED" in out or (os.cpu_count() or 1) >= 4
    assert "stages were idle" in out


def test_a_rank_that_dies_ends_the_run_and_the_text_is_kept(
    files: list[str], tmp_path: Path
) -> None:
    more = ["--prompt", "x", "--ignore-eos", "--max-new-tokens", str(CONTEXT - 1), "--json"]
    many = tmp_path / "many.txt"
    many.write_text("x\n" * 500)
    more[:2] = ["--prompts", str(many)]
    job = torchrun(2, *files, *more, cwd=tmp_path)
    assert job.stderr is not None
    said = ""
    for line in job.stderr:
        said += line
        if line.startswith("[3/5"):
            break
    assert job.poll() is None, said
    victim = next(
        child
        for child in psutil.Process(job.pid).children(recursive=True)
        if child.environ().get("RANK") == "1"
    )
    victim.send_signal(signal.SIGKILL)
    started = time.monotonic()
    said += job.communicate(timeout=60)[1]
    assert time.monotonic() - started < 40, said
    assert job.returncode != 0
    assert "Signal 9 (SIGKILL)" in said
    assert "The text so far is in generate-interrupted.jsonl" in said
    lines = (tmp_path / "generate-interrupted.jsonl").read_text().splitlines()
    kept = [json.loads(line) for line in lines]
    assert len(kept) >= 2
    assert kept[0]["finish_reason"] == "length"
    assert all(line["text"] for line in kept)
