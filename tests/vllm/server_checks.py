"""What every server with FlashHead must stand, whatever its `tp_size`."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

from flashhead_dist.serving.server import Server
from tests.vllm.server_answers import MIXED, Answers
from tests.vllm.server_requests import GREEDY, texts
from tests.vllm.serving import ask, counters, gauge, stream

LONG = GREEDY | {"max_tokens": 900, "ignore_eos": True}
_GENERATED = "vllm:generation_tokens_total"
_RUNNING = "vllm:num_requests_running"


def check_batch_of_mixed_requests(server: Server, dense_answers: Answers) -> None:
    """All at once, and each is answered as the dense server answered it alone."""
    with ThreadPoolExecutor(len(MIXED)) as pool:
        found = list(pool.map(lambda request: texts(ask(server, request)), MIXED))
    assert found == [texts(dense_answers[request]) for request in MIXED]


def check_cancelled_request(server: Server, dense_answers: Answers) -> None:
    """The rest of the text is not decoded, and the next request finds a clean row."""
    before = gauge(server, _GENERATED)
    pieces = stream(server, LONG)
    for _ in range(3):
        next(pieces)
    pieces.close()
    while gauge(server, _RUNNING):
        time.sleep(0.1)
    assert gauge(server, _GENERATED) - before < LONG["max_tokens"]
    assert texts(ask(server, MIXED[0])) == texts(dense_answers[MIXED[0]])


def check_counters(server: Server, tp_size: int) -> None:
    """Steps are counted once, whatever the number of ranks; bytes cross only between ranks."""
    before = counters(server)
    ask(server, GREEDY)
    found = counters(server)
    grown = {name: found[name] - before.get(name, 0.0) for name in found}
    number = GREEDY["max_tokens"]
    assert grown['steps_total{head="flashhead"}'] == number
    assert grown['rows_total{head="flashhead"}'] == number
    assert number < grown["candidates_total"] < number * 262_144 / 2
    assert (grown.get("exchange_bytes_total", 0.0) > 0) == (tp_size > 1)


def assert_nothing_left(everyone: Sequence[psutil.Process], files: set[Path], tp_size: int) -> None:
    """No process of a server that ended, and no file of it in shared memory.

    But for vLLM's own: it kills the workers of several CPU ranks as it ends, and their communicator
    then leaves 4 MB a rank, with FlashHead or without.
    """
    psutil.wait_procs(list(everyone), timeout=60)
    assert [p for p in everyone if p.is_running() and p.status() != psutil.STATUS_ZOMBIE] == []
    left = [path for path in files if path.exists()]
    if tp_size > 1:
        for path in [path for path in left if "-cpushm_" in path.name]:
            path.unlink()
            left.remove(path)
    assert left == []


def ranges_of(log: Path) -> list[dict[str, Any]]:
    """The NVTX ranges that began so far, of a server that tests/profiles/nvtx_listener.c heard."""
    events = [json.loads(line) for line in log.read_text().splitlines()]
    return [event for event in events if event["event"] == "push"]
