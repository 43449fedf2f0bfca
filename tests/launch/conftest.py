"""The scale command as a module, and a small run to make mistakes in."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file

from flashhead_dist.models import open_model
from tests.launch.ground import LAUNCH, NUM_GROUPS, VOCAB_SIZE, Ground, Refused, build_small
from tests.launch.scripts import load_script

sys.path.append(str(LAUNCH))


@pytest.fixture(scope="module")
def scale() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(LAUNCH))
        yield load_script("scale")


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
        index = build_small(open_model(str(model)), scratch / "index", NUM_GROUPS, num_probes=8)
        yield Ground(model, index, states, scratch)


@pytest.fixture
def ground(files: Ground, tmp_path: Path) -> Ground:
    return Ground(files.model, files.index, files.states, tmp_path)
