"""Every mistake of a user: exit code 2 and one sentence that names the value and a remedy."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file

from flashhead_dist.index import IndexOptions, build_index
from flashhead_dist.model_source import open_model

LAUNCH = Path(__file__).parents[2] / "launch"
QUICK = ("--heads", "flashhead", "--iters", "1", "--batch-sizes", "1", "--max-states", "16")
Refused = Callable[..., str]


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

    def run(*arguments: str, runs_dir: Path | None = None) -> str:
        code = scale.main(["--runs-dir", str(runs_dir or tmp_path / "runs"), *arguments])
        captured = capsys.readouterr()
        assert code == 2, captured.err
        assert captured.out == ""
        assert "Traceback" not in captured.err
        said = [line for line in captured.err.splitlines() if line.startswith("error: ")]
        assert len(said) == 1, captured.err
        return said[0]

    return run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with an output embedding `[500, 64]`, and a cache of its own."""
    folder = tmp_path_factory.mktemp("model")
    rows = torch.randn(500, 64, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    save_file({"lm_head.weight": rows}, folder / "model.safetensors")
    config = {"model_type": "llama", "vocab_size": 500, "hidden_size": 64}
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLASHHEAD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield folder


@pytest.fixture(scope="module")
def index(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_index(
        open_model(str(model)),
        IndexOptions(num_groups=4, num_probes=8, alpha=0.0),
        calibration=None,
        test=None,
        out=tmp_path_factory.mktemp("index") / "index",
        device="cpu",
        progress=False,
    )


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("states") / "states.safetensors"
    save_file({"hidden_states": torch.randn(32, 64)}, path)
    return path


@pytest.fixture
def given(model: Path, index: Path, states: Path) -> list[str]:
    """Arguments of a run that works."""
    return [*QUICK, "--model", str(model), "--index", str(index), "--hidden-states", str(states)]


def test_what_the_mistakes_are_made_in_works(
    scale: ModuleType, given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert scale.main([*given, "--runs-dir", str(tmp_path), "--skip-plots", "--json"]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [record["head"] for record in document["records"]] == ["flashhead"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--heads", "flashhed"], "flashhed"),
        (["--batch-sizes", "1,0"], "--batch-sizes holds 0"),
        (["--batch-sizes", "one"], "one"),
        (["--tp-sizes", "2"], "tp size 2"),
        (["--iters", "0"], "--iters is 0"),
        (["--num-probes", "0"], "--num-probes is 0"),
        (["--threads-per-rank", "0"], "--threads-per-rank is 0"),
        (["--cell-seconds", "0"], "--cell-seconds is 0"),
        (["--dtype", "int3"], "int3"),
        (["--nonsense"], "--nonsense"),
        (["--synthetic", "12"], "12"),
        (["--model", "/nowhere/at/all.gguf"], "/nowhere/at/all.gguf"),
        (["--device", "cuda"], "cuda"),
    ],
)
def test_wrong_arguments(refused: Refused, arguments: list[str], named: str, model: Path) -> None:
    if arguments[0] == "--device" and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    assert model.exists()
    assert named in refused(*QUICK, *arguments)


def test_too_many_probes(refused: Refused, given: list[str]) -> None:
    assert "100000" in refused(*given, "--num-probes", "100000")


def test_truncated_model(refused: Refused, model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "model"
    shutil.copytree(model, broken)
    path = broken / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    assert str(path) in refused(*QUICK, "--model", str(broken))


def test_index_of_other_weights(
    refused: Refused, given: list[str], model: Path, tmp_path: Path
) -> None:
    other = tmp_path / "model"
    shutil.copytree(model, other)
    save_file({"lm_head.weight": torch.ones(500, 64)}, other / "model.safetensors")
    given[given.index("--model") + 1] = str(other)
    assert "weights" in refused(*given)


def test_index_damaged_by_one_byte(
    refused: Refused, given: list[str], index: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "index"
    shutil.copytree(index, broken)
    path = broken / "index.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    given[given.index("--index") + 1] = str(broken)
    assert str(broken) in refused(*given)


def test_missing_index(refused: Refused, given: list[str], tmp_path: Path) -> None:
    given[given.index("--index") + 1] = str(tmp_path / "none")
    assert str(tmp_path / "none") in refused(*given)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_hidden_states_that_are_not_finite(
    refused: Refused, given: list[str], tmp_path: Path, value: float
) -> None:
    bad = torch.randn(32, 64)
    bad[7, 3] = value
    save_file({"hidden_states": bad}, tmp_path / "bad.safetensors")
    given[given.index("--hidden-states") + 1] = str(tmp_path / "bad.safetensors")
    assert "row 7" in refused(*given)


def test_hidden_states_of_another_width(refused: Refused, given: list[str], tmp_path: Path) -> None:
    save_file({"hidden_states": torch.randn(4, 32)}, tmp_path / "narrow.safetensors")
    given[given.index("--hidden-states") + 1] = str(tmp_path / "narrow.safetensors")
    sentence = refused(*given)
    assert "32" in sentence
    assert "64" in sentence


def test_runs_dir_that_is_a_file(refused: Refused, given: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "--runs-dir" in refused(*given, runs_dir=tmp_path / "file")


def _torchrun(num_ranks: int, *arguments: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(num_ranks)]
    done = subprocess.run(
        [*command, str(LAUNCH / "scale.py"), *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stderr


def test_more_ranks_than_probing_groups(given: list[str], tmp_path: Path) -> None:
    code, said = _torchrun(5, *given, "--tp-sizes", "5", "--runs-dir", str(tmp_path))
    assert code != 0
    assert "4 probing groups" in said
    assert "exitcode  : 2" in said


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small file system")
def test_full_disk(given: list[str], tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(disk)], check=True)
    try:
        code, said = _torchrun(
            2, *given, "--batch-sizes", "1,2,3,4,5,6,7,8", "--skip-plots", "--runs-dir", str(disk)
        )
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert code != 0
    assert "No space left on device" in said
    assert "exitcode  : 2" in said
