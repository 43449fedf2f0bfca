"""Requests to a real server: plain JSON over HTTP, as the OpenAI API has it."""

from __future__ import annotations

import http.client
import json
import sys
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from flashhead_dist.serving.bench import parse_counters
from flashhead_dist.serving.server import SERVED_NAME, Server, ServerOptions

NEEDS_VLLM = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        find_spec("vllm") is None, reason="vLLM is not installed here: run `make test-vllm`"
    ),
    # A server takes a minute to start, more where the machine has other work.
    pytest.mark.timeout(3600),
]
"""`pytestmark` of every module here."""

TIMEOUT_S = 900
EAGER = ("--enforce-eager", "--no-enable-prefix-caching", "--max-num-seqs", "8")


def options(model: Path, tp_size: int, flashhead: Any, **more: Any) -> ServerOptions:
    """A server in float32: what differs between heads is then the head, not the rounding.

    A thread a rank: threads that wait for each other are slow beside other work.
    """
    return ServerOptions(
        python=Path(sys.executable),
        model=model,
        tp_size=tp_size,
        flashhead=flashhead,
        dtype="float32",
        cores=tp_size,
        max_model_len=1024,
        kv_cache_mb=256,
        more=EAGER,
        **more,
    )


def ask(server: Server, request: Mapping[str, Any]) -> dict[str, Any]:
    """The answer to one completion request, read whole."""
    connection = _send(server, request)
    with connection.getresponse() as answer:
        found: dict[str, Any] = json.loads(answer.read())
        assert answer.status == 200, found
    connection.close()
    return found


def stream(server: Server, request: Mapping[str, Any]) -> Iterator[str]:
    """The pieces of a streamed text; closing the iterator closes the connection.

    Raises:
        ConnectionError: the server says that the request failed.
    """
    connection = _send(server, {**request, "stream": True})
    with closing(connection), connection.getresponse() as answer:
        assert answer.status == 200, answer.read()
        for line in answer:
            data = line.decode().removeprefix("data: ").strip()
            if data and data != "[DONE]":
                found = json.loads(data)
                if "choices" not in found:
                    raise ConnectionError(data)
                yield found["choices"][0]["text"]


def metrics(server: Server) -> str:
    """What /metrics says."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=TIMEOUT_S) as answer:
        return str(answer.read().decode())


def gauge(server: Server, name: str) -> float:
    """The sum over labels of a metric."""
    lines = [line for line in metrics(server).splitlines() if line.startswith(name)]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def counters(server: Server) -> dict[str, float]:
    """The plugin's counters, without what stands before them all."""
    found = parse_counters(metrics(server))
    return {name.removeprefix("vllm:flashhead_"): value for name, value in found.items()}


def shared_memory(server: Server) -> set[Path]:
    """Files in shared memory that any process of the server has mapped."""
    found = set()
    for process in server.processes():
        try:
            lines = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
        except OSError:
            continue
        names = (line.split(maxsplit=5)[-1] for line in lines)
        found |= {Path(name) for name in names if name.startswith("/dev/shm/")}
    return {path for path in found if "(deleted)" not in path.name}


def _send(server: Server, request: Mapping[str, Any]) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=TIMEOUT_S)
    body = json.dumps({"model": SERVED_NAME, **request})
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    return connection
