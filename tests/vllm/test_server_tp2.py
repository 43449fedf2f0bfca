"""One OpenAI server with FlashHead on two ranks, up to the death of one of them."""

from __future__ import annotations

import time
from http.client import HTTPException

import pytest

from flashhead_dist.serving.server import Server
from tests.vllm.server_answers import Answers
from tests.vllm.server_checks import (
    LONG,
    check_batch_of_mixed_requests,
    check_cancelled_request,
    check_counters,
)
from tests.vllm.serving import NEEDS_VLLM, stream

pytestmark = NEEDS_VLLM
TP_SIZE = 2


def test_a_batch_of_mixed_requests(flashhead_server: Server, dense_answers: Answers) -> None:
    check_batch_of_mixed_requests(flashhead_server, dense_answers)


def test_a_cancelled_request(flashhead_server: Server, dense_answers: Answers) -> None:
    check_cancelled_request(flashhead_server, dense_answers)


def test_counters_of_two_ranks(flashhead_server: Server) -> None:
    check_counters(flashhead_server, TP_SIZE)


def test_a_worker_killed_in_mid_request_ends_it_with_an_error(flashhead_server: Server) -> None:
    """No hang: the client is told, and the server ends by itself. The last test of its server."""
    workers = [p for p in flashhead_server.processes() if "VLLM::Worker" in " ".join(p.cmdline())]
    assert len(workers) == TP_SIZE
    pieces = stream(flashhead_server, LONG)
    next(pieces)
    workers[-1].kill()
    with pytest.raises((ConnectionError, HTTPException)):
        list(pieces)
    deadline = time.monotonic() + 600
    while flashhead_server.returncode is None:
        assert time.monotonic() < deadline
        time.sleep(0.2)
