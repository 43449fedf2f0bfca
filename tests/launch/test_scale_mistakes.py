"""Every mistake of a user: one sentence that names the value and a remedy, and code 2 everywhere.

With one rank the command runs in this process; with several, under torchrun, where only what it
prints and how its ranks end can be seen.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file

from flashhead_dist.index import IndexOptions, build_index
from flashhead_dist.model_source import open_model

LAUNCH = Path(__file__).parents[2] / "launch"
NUM_GROUPS = 4
VOCAB_SIZE = 500
Refused = Callable[..., str]


@dataclass(frozen=True)
class Ground:
    """Files of a run that works, and a folder to spoil copies of them in."""

    model: Path
    index: Path
    states: Path
    scratch: Path

    def arguments(self, *more: str, **changed: Path) -> list[str]:
        files = {"model": self.model, "index": self.index, "hidden_states": self.states} | changed
        named = [(f"--{name.replace('_', '-')}", str(path)) for name, path in files.items()]
        quick = ["--heads", "flashhead", "--iters", "1", "--batch-sizes", "1"]
        return [*quick, "--max-states", "16", *(word for pair in named for word in pair), *more]

    def copy_of(self, folder: Path) -> Path:
        return shutil.copytree(folder, self.scratch / folder.name)


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
    index = _build(model, ground.scratch / "one_group", num_groups=1, num_probes=2)
    return Mistake(ground.arguments(index=index), "1 probing groups", "fewer ranks")


WITH_SEVERAL_RANKS = (
    *(m for m in WITH_ANY_RANKS if m not in (hidden_states_with_infinity, no_index)),
    fewer_tokens_than_ranks,
    more_ranks_than_groups,
)


@pytest.fixture(scope="module")
def scale() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(LAUNCH))
        spec = importlib.util.spec_from_file_location("scale_script", LAUNCH / "scale.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


@pytest.fixture
def refused(
    scale: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Refused:
    """Run one rank, check that it refuses in one sentence, and return that."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: str) -> str:
        code = scale.main(["--runs-dir", str(tmp_path / "runs"), "--skip-plots", *arguments])
        captured = capsys.readouterr()
        assert code == 2, captured.err
        assert captured.out == ""
        assert "Traceback" not in captured.err
        said = [line for line in captured.err.splitlines() if line.startswith("error: ")]
        assert len(said) == 1, captured.err
        return said[0]

    return run


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    """A model whose output embedding is `[500, 64]`, its index, states, and a cache of its own."""
    scratch = tmp_path_factory.mktemp("ground")
    model, states = scratch / "model", scratch / "states.safetensors"
    model.mkdir()
    random = torch.Generator().manual_seed(1)
    rows = torch.randn(VOCAB_SIZE, 64, generator=random).to(torch.bfloat16)
    save_file({"lm_head.weight": rows}, model / "model.safetensors")
    config = {"model_type": "llama", "vocab_size": VOCAB_SIZE, "hidden_size": 64}
    (model / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    save_file({"hidden_states": torch.randn(32, 64, generator=random)}, states)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLASHHEAD_CACHE", str(scratch / "cache"))
        index = _build(open_model(str(model)), scratch / "index", NUM_GROUPS, num_probes=8)
        yield Ground(model, index, states, scratch)


@pytest.fixture
def ground(files: Ground, tmp_path: Path) -> Ground:
    return Ground(files.model, files.index, files.states, tmp_path)


def _build(model: object, out: Path, num_groups: int, num_probes: int) -> Path:
    options = IndexOptions(num_groups=num_groups, num_probes=num_probes, alpha=0.0)
    return build_index(
        model, options, calibration=None, test=None, out=out, device="cpu", progress=False
    )


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
        (["--heads", ""], "--heads names none"),
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


def _torchrun(*arguments: str, python_path: Path | None = None) -> tuple[int, str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    paths = [str(python_path)] if python_path else []
    paths += [path for path in [os.environ.get("PYTHONPATH")] if path]
    done = subprocess.run(
        [*command, str(LAUNCH / "scale.py"), "--skip-plots", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == ""
    return done.returncode, done.stderr


def _sentence_of_two_ranks(code: int, stderr: str) -> str:
    """The one sentence of a job whose ranks both ended with 2, and its root cause."""
    assert code == 1, stderr  # torchrun's own code for any rank that fails
    said = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1, stderr
    assert stderr.count("exitcode  : 2 ") == 2, stderr
    assert f"traceback : {said[0]}" in stderr.partition("Root Cause")[2]
    # torchrun's own traceback cannot be helped; one of ours would name our files.
    ours = str(LAUNCH.parent / "flashhead_dist"), str(LAUNCH)
    assert not any(f'File "{folder}' in stderr for folder in ours), stderr
    return said[0]


@pytest.mark.parametrize("make", WITH_SEVERAL_RANKS)
def test_two_ranks_refuse_together(
    make: Callable[[Ground], Mistake], ground: Ground, slow_first_rank: Path
) -> None:
    mistake = make(ground)
    runs = ("--runs-dir", str(ground.scratch / "runs"))
    code, stderr = _torchrun(*runs, *mistake.arguments, python_path=slow_first_rank)
    sentence = _sentence_of_two_ranks(code, stderr)
    assert mistake.value in sentence
    assert mistake.remedy in sentence


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
        code, stderr = _torchrun(*ground.arguments(*batch_sizes, "--runs-dir", str(disk)))
        (records,) = disk.glob("*/records.jsonl")
        lines = records.read_text().split("\n")[:-1]
    sentence = _sentence_of_two_ranks(code, stderr)
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
    assert "latency.png (No space left on device)" in said
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
