"""Requests to a real vLLM server: plain JSON over HTTP, as the OpenAI API has it.

A `Case` needs one sampling parameter to take effect. It is sent to a dense server and to one with
FlashHead, under the same seed. Its second request, without the parameter, must have another answer:
else an ignored parameter would go unnoticed.
"""

from __future__ import annotations

import http.client
import json
import sys
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from flashhead_dist.serving.bench import parse_counters
from flashhead_dist.serving.server import SERVED_NAME, Server, ServerOptions

PROMPT = "The most important thing about tides is"
COUNTING = "One, two, three, four, five, one, two, three, four, five, one, two,"
GREEDY: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 16, "temperature": 0}
DRAWN: dict[str, Any] = GREEDY | {"temperature": 0.7, "seed": 11}
LONGER: dict[str, Any] = GREEDY | {"max_tokens": 48}
COUNTED: dict[str, Any] = GREEDY | {"prompt": COUNTING}


@dataclass(frozen=True)
class Case:
    """A request, and the same without the parameter.

    reason: why it needs the dense path, or None.
    """

    request: dict[str, Any]
    without: dict[str, Any]
    reason: str | None = None


CASES = {
    "temperature": Case(DRAWN, GREEDY | {"seed": 11}),
    "seed": Case(DRAWN | {"seed": 12}, DRAWN),
    "top_k": Case(DRAWN | {"temperature": 1.5, "top_k": 3}, DRAWN | {"temperature": 1.5}),
    "top_p": Case(DRAWN | {"temperature": 1.2, "top_p": 0.3}, DRAWN | {"temperature": 1.2}),
    "min_p": Case(DRAWN | {"temperature": 1.2, "min_p": 0.3}, DRAWN | {"temperature": 1.2}),
    "presence_penalty": Case(LONGER | {"presence_penalty": 2.0}, LONGER),
    "frequency_penalty": Case(COUNTED | {"frequency_penalty": 2.0}, COUNTED),
    "repetition_penalty": Case(COUNTED | {"repetition_penalty": 2.0}, COUNTED),
    "stop": Case(COUNTED | {"stop": ["five"]}, COUNTED),
    "n": Case(DRAWN | {"n": 2}, DRAWN),
    "min_tokens": Case(COUNTED | {"min_tokens": 8, "stop": ["five"]}, COUNTED | {"stop": ["five"]}),
    "bad_words": Case(COUNTED | {"bad_words": ["three", " three"]}, COUNTED),
    "allowed_token_ids": Case(
        GREEDY | {"allowed_token_ids": [506, 529, 1437]}, GREEDY, "allowed_token_ids"
    ),
    "structured_outputs": Case(
        GREEDY | {"structured_outputs": {"choice": ["salt", "sand"]}}, GREEDY, "structured_outputs"
    ),
    "positive logit_bias": Case(GREEDY | {"logit_bias": {"1437": 50.0}}, GREEDY, "logit_bias"),
    "presence_penalty below 0": Case(
        COUNTED | {"presence_penalty": -2.0, "temperature": 1.5, "seed": 3},
        COUNTED | {"temperature": 1.5, "seed": 3},
        "raised_penalties",
    ),
}

MIXED: tuple[dict[str, Any], ...] = (
    GREEDY | {"max_tokens": 24},
    DRAWN | {"temperature": 0.6},
    GREEDY | {"prompt": "Once upon a time", "max_tokens": 12},
    DRAWN | {"prompt": "Once upon a time", "temperature": 1.2, "top_p": 0.3, "seed": 5},
    GREEDY | {"prompt": "La mer est", "repetition_penalty": 1.5},
    DRAWN | {"prompt": "1 2 3 4 5 6", "top_k": 2, "seed": 9, "max_tokens": 30},
    GREEDY | {"prompt": "def add(a, b):", "stop": ["\n\n"], "max_tokens": 30},
    GREEDY | {"prompt": PROMPT * 6, "logprobs": 3},
)
"""Eight requests of other lengths and parameters, none of which needs the dense path."""

LOGPROBS = GREEDY | {"logprobs": 5}
PROMPT_LOGPROBS = GREEDY | {"prompt_logprobs": 2, "max_tokens": 4}
TOKEN_IDS = GREEDY | {"return_token_ids": True}

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
    """The text of /metrics."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=TIMEOUT_S) as answer:
        return str(answer.read().decode())


def metric(server: Server, name: str) -> float:
    """The sum over labels of a metric."""
    lines = [line for line in metrics(server).splitlines() if line.startswith(name)]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def counters(server: Server) -> dict[str, float]:
    """The plugin's counters, without their common prefix."""
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


def texts(answer: dict[str, Any]) -> list[tuple[str, str | None]]:
    """Text and end of every choice."""
    return [(choice["text"], choice["finish_reason"]) for choice in answer["choices"]]


class Answers:
    """A server's answers by request."""

    def __init__(self, server: Server) -> None:
        requests = [request for case in CASES.values() for request in (case.request, case.without)]
        requests += [*MIXED, LOGPROBS, PROMPT_LOGPROBS, TOKEN_IDS]
        self._answers = {json.dumps(request): ask(server, request) for request in requests}

    def __getitem__(self, request: Mapping[str, Any]) -> dict[str, Any]:
        return self._answers[json.dumps(request)]
