"""A small model, its index, and simulated GPUs to run heads on."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from flashhead_dist.heads.base import Head
from flashhead_dist.heads.registry import HeadBuilder
from flashhead_dist.index import IndexOptions, build_index
from flashhead_dist.models import ModelSource, open_model
from flashhead_dist.parallel import TensorParallel
from flashhead_dist.states import HiddenStates, synthetic_hidden_states
from flashhead_kernels import launch_choice

sys.path.append(str(Path(__file__).parents[2] / "kernels"))

if TYPE_CHECKING:
    from simulated_cuda import SimulatedCuda

VOCAB_SIZE, HIDDEN_SIZE = 113, 32
OPTIONS = {"num_groups": 2, "cluster_size": 4, "num_probes": 8, "group_size": 32}


@dataclass
class Small:
    """A model of 113 rows of 32 columns, states of it, and an index that pins three tokens."""

    folder: Path
    model: ModelSource
    index_dir: Path
    calibration: HiddenStates
    test: HiddenStates

    @property
    def states(self) -> Tensor:
        """Hidden states bfloat16 `[n, 32]`."""
        return self.test.states.to(torch.bfloat16)

    def head(self, name: str, device: str = "cuda") -> Head:
        """A new head on one rank."""
        builder = HeadBuilder(
            tp=TensorParallel.single(device),
            model=self.model,
            index_dir=self.index_dir,
            device=device,
        )
        return builder.build(name)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Small]:
    """Built on the CPU, outside of any simulation."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLASHHEAD_CACHE", str(tmp_path_factory.mktemp("cache")))
        folder = tmp_path_factory.mktemp("small")
        draw = torch.Generator().manual_seed(3)
        centres = torch.randn(12, HIDDEN_SIZE, generator=draw)
        rows = centres[torch.randint(12, (VOCAB_SIZE,), generator=draw)]
        rows = rows + 0.7 * torch.randn(VOCAB_SIZE, HIDDEN_SIZE, generator=draw)
        save_file({"lm_head.weight": rows.to(torch.bfloat16)}, folder / "model.safetensors")
        config = {"model_type": "llama", "vocab_size": VOCAB_SIZE, "hidden_size": HIDDEN_SIZE}
        config |= {"tie_word_embeddings": False}
        (folder / "config.json").write_text(json.dumps(config))
        model = open_model(str(folder))
        sources = torch.arange(48) % 3 // 2
        calibration, test = (
            HiddenStates(part.states, sources, ("text", "code"), part.origin)
            for part in synthetic_hidden_states(model, num_states=48)
        )
        small = Small(folder, model, folder / "index", calibration, test)
        options = IndexOptions(**OPTIONS, alpha=0.02, pinned_token_ids=(110, 7, 61))
        build_index(
            model, options, calibration=calibration, test=test, out=small.index_dir,
            device="cpu", progress=False,
        )  # fmt: skip
        yield small


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimulatedCuda]:
    """Two simulated GPUs; the head takes one launch wherever that serves, and times nothing."""
    if torch.cuda.is_available():
        pytest.skip("a real GPU is here: kernels are not interpreted")
    from simulated_cuda import simulated_cuda

    monkeypatch.setattr(launch_choice, "launch_clock", lambda device: None)
    with simulated_cuda(num_devices=2) as simulated:
        yield simulated
