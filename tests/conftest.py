"""Where there is no GPU, Triton kernels run in its interpreter, on CPU tensors.

Triton reads the variable when it is first imported, its own library functions included.

A shell has its background jobs ignore Ctrl-C, and what they start as well; tests that send it to a
process of theirs want it heard.

Fixtures: gloo ranks as processes of their own, and a small model full of ties.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

from flashhead_dist.index import IndexOptions, build_index
from flashhead_dist.models import open_model
from flashhead_dist.states import HiddenStates, synthetic_hidden_states

if TYPE_CHECKING:
    from tests.integrations.transformers_zoo import Zoo

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

RANK_MAIN = Path(__file__).with_name("rank_main.py")
ROOT = Path(__file__).parents[1]


class RankFailedError(Exception):
    """A rank exited with an error; its text holds what the ranks wrote to stderr."""


def _run_ranks(
    folder: Path, function: Callable[..., Any], world_size: int, *arguments: Any, timeout_s: float
) -> list[Any]:
    torch.save(arguments, folder / "arguments.pt")
    errors = [folder / f"stderr_{rank}" for rank in range(world_size)]
    processes = []
    for rank in range(world_size):
        environment = os.environ | {
            "RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "OMP_NUM_THREADS": "1",
            "RANK_TIMEOUT_S": str(timeout_s),
            # As pytest has it: a test's helpers are found by their place under the root.
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            # Large tensors of many sizes leave the heap in gaps: docs/decisions.
            "MALLOC_MMAP_THRESHOLD_": str(1 << 20),
        }
        file = function.__code__.co_filename
        with errors[rank].open("w") as stderr:
            processes.append(
                subprocess.Popen(
                    [sys.executable, RANK_MAIN, folder, file, function.__name__],
                    env=environment,
                    stderr=stderr,
                )
            )
    try:
        _wait(processes, errors, timeout_s)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [
        torch.load(folder / f"result_{rank}.pt", weights_only=False) for rank in range(world_size)
    ]


def _wait(processes: list[subprocess.Popen[bytes]], errors: list[Path], timeout_s: float) -> None:
    """Return when all ranks have ended well; raise for the first that has not."""
    deadline = time.monotonic() + timeout_s
    running = set(range(len(processes)))
    while running:
        for rank in sorted(running):
            code = processes[rank].poll()
            if code is None:
                continue
            if code != 0:
                written = "\n".join(path.read_text() for path in errors)
                raise RankFailedError(f"rank {rank} failed:\n{written}")
            running.remove(rank)
        if time.monotonic() > deadline:
            raise TimeoutError(f"ranks {sorted(running)} still run after {timeout_s} s")
        time.sleep(0.02)


@pytest.fixture(scope="session")
def run_ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Any]]:
    """`run_ranks(function, world_size, *arguments, timeout_s=120)` -> every rank's result.

    `function(rank, world_size, *arguments)` is a top-level function of a test file. The first rank
    that fails ends the others and raises RankFailedError.
    """

    def run(
        function: Callable[..., Any], world_size: int, *arguments: Any, timeout_s: float = 120
    ) -> list[Any]:
        folder = tmp_path_factory.mktemp("ranks")
        return _run_ranks(folder, function, world_size, *arguments, timeout_s=timeout_s)

    return run


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What is derived in this module, by its ranks too, goes to a folder that nothing else uses."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLASHHEAD_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def tied_model(own_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an output embedding `[1013, 64]` in bf16, whose row v equals row 1012 - v.

    1013 is prime: no tp_size divides it.
    """
    assert own_cache.is_dir()
    folder = tmp_path_factory.mktemp("tied_model")
    draw = torch.Generator().manual_seed(3)
    centres = torch.randn(40, 64, generator=draw)
    half = centres[torch.randint(40, (507,), generator=draw)]
    half = (half + 0.7 * torch.randn(507, 64, generator=draw)).to(torch.bfloat16)
    rows = torch.cat([half, half[:506].flip(0)])
    save_file({"lm_head.weight": rows.contiguous()}, folder / "model.safetensors")
    config = {"model_type": "llama", "vocab_size": 1013, "hidden_size": 64}
    config |= {"tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def tied_index(tied_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of `tied_model`: 8 groups of 32 clusters of 4 tokens, 2 probes a group.

    Equal rows end up in one cluster, so that only pinning sets ties apart over the ranks.
    """
    options = IndexOptions(
        num_groups=8, num_probes=16, alpha=0.02, pinned_token_ids=(1005, 900, 612)
    )
    return build_index(
        open_model(str(tied_model)),
        options,
        calibration=None,
        test=None,
        out=tmp_path_factory.mktemp("index") / "tied",
        device="cpu",
        progress=False,
    )


@pytest.fixture(scope="module")
def index_states(tied_model: Path) -> tuple[HiddenStates, HiddenStates]:
    """Calibration and test states of `tied_model`, 300 each, of two sources."""
    model = open_model(str(tied_model))
    parts = []
    for part in synthetic_hidden_states(model, num_states=300):
        source_ids = torch.arange(300) % 3 // 2
        parts.append(HiddenStates(part.states, source_ids, ("text", "code"), part.origin))
    return parts[0], parts[1]


@pytest.fixture
def build_one(
    tied_model: Path, index_states: tuple[HiddenStates, HiddenStates], tmp_path: Path
) -> Callable[..., Path]:
    """Build an index of `tied_model` at `name`: 8 groups, few probes, and what `options` say."""
    model = open_model(str(tied_model))
    calibration, test = index_states

    def run(name: str = "index", /, replace: bool = False, **changes: Any) -> Path:
        known = {"calibration", "test", "progress", "model"}
        given = {key: changes.pop(key) for key in known & set(changes)}
        options = IndexOptions(**{"num_groups": 8, "num_probes": 16, **changes})
        return build_index(
            given.get("model", model),
            options,
            calibration=given.get("calibration", calibration),
            test=given.get("test", test),
            out=tmp_path / name,
            device="cpu",
            replace_existing=replace,
            progress=given.get("progress", False),
        )

    return run


@pytest.fixture(scope="module")
def zoo(own_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """Small transformers models, dense and with a retrieval head."""
    assert own_cache.is_dir()
    from tests.integrations.transformers_zoo import Zoo

    return Zoo(tmp_path_factory.mktemp("zoo"))
