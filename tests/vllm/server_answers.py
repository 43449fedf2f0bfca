"""What a dense server answers to every request that the tests of servers compare with."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from flashhead_dist.serving.server import Server
from tests.vllm.server_requests import CASES, DRAWN, GREEDY, PROMPT
from tests.vllm.serving import ask

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


class Answers:
    """Answers by request."""

    def __init__(self, server: Server, requests: Iterable[Mapping[str, Any]]) -> None:
        self._found = {_key(request): ask(server, request) for request in requests}

    def __getitem__(self, request: Mapping[str, Any]) -> dict[str, Any]:
        return self._found[_key(request)]


def compared_requests() -> list[dict[str, Any]]:
    """Every request of which a dense server's answer is needed."""
    cases = [request for case in CASES.values() for request in (case.request, case.without)]
    return [*cases, *MIXED, LOGPROBS, PROMPT_LOGPROBS, TOKEN_IDS]


def _key(request: Mapping[str, Any]) -> str:
    return json.dumps(request, sort_keys=True)
