"""Gemma-3-270M, its index, and servers of it; only where vLLM is installed.

A server takes up to five gigabytes, so that one is up at a time: the dense one answers everything
first, and ends. Nothing here imports numba at once: vLLM's engine does not start in a process that
has it.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from flashhead_dist.serving.server import Server
from tests.vllm.server_answers import Answers, compared_requests
from tests.vllm.server_checks import assert_nothing_left
from tests.vllm.serving import options, shared_memory

NVTX_LISTENER = Path(__file__).parents[1] / "profiles" / "nvtx_listener.c"


@pytest.fixture(scope="session")
def model() -> Path:
    """The folder of the default model, assembled where it is not in the cache."""
    from flashhead_dist.models.cache import cache_root
    from flashhead_dist.models.default_model import default_model_folder

    return default_model_folder(cache_root())


@pytest.fixture(scope="session")
def index() -> Path:
    """The default model's index, built where it is not in the cache (minutes)."""
    from flashhead_dist.index import ensure_index
    from flashhead_dist.models import open_model

    return ensure_index(open_model(None))


@pytest.fixture(scope="session")
def dense_answers(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """Of a server with the plugin installed and not switched on."""
    log = tmp_path_factory.mktemp("dense") / "server.log"
    with Server(options(model, 1, None), log) as server:
        server.wait_ready()
        return Answers(server, compared_requests())


@pytest.fixture(scope="session")
def nvtx_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a tool hears of servers' NVTX ranges; never written where there is no C compiler."""
    return tmp_path_factory.mktemp("nvtx") / "ranges.jsonl"


@pytest.fixture(scope="module")
def flashhead_server(
    model: Path,
    index: Path,
    nvtx_log: Path,
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> Iterator[Server]:
    """A server with FlashHead, of the module's TP_SIZE, which leaves nothing behind."""
    folder = tmp_path_factory.mktemp("flashhead")
    tp_size = request.module.TP_SIZE
    environment = {}
    if compiler := shutil.which("cc") or shutil.which("gcc"):
        library = folder / "listener.so"
        command = [compiler, "-shared", "-fPIC", str(NVTX_LISTENER), "-o", str(library)]
        subprocess.run(command, check=True)
        environment = {"NVTX_INJECTION64_PATH": str(library), "NVTX_LOG": str(nvtx_log)}
    asked = options(model, tp_size, {"index": str(index)}, environment=environment)
    with Server(asked, folder / "server.log") as server:
        server.wait_ready()
        everyone, files = server.processes(), shared_memory(server)
        assert files
        yield server
    assert_nothing_left(everyone, files, tp_size)
