"""OpenAI servers with FlashHead on one rank and on two, compared with a dense server.

All run in float32 under the same seeds. The dense server's answers with and without a parameter
differ, so an ignored parameter shows. A server takes up to five gigabytes, so that one is up at a
time: the dense one answers everything first, and ends. Nothing here imports numba at once: vLLM's
engine does not start in a process that has it.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path
from typing import Any

import psutil
import pytest

from flashhead_dist.serving.server import Server
from tests.vllm.servers import (
    CASES,
    GREEDY,
    LOGPROBS,
    MIXED,
    NEEDS_VLLM,
    PROMPT_LOGPROBS,
    TOKEN_IDS,
    Answers,
    Case,
    ask,
    counters,
    metric,
    options,
    shared_memory,
    stream,
    texts,
)

pytestmark = NEEDS_VLLM
ONE_RANK = pytest.mark.parametrize("server", [1], indirect=True)
TWO_RANKS = pytest.mark.parametrize("server", [2], indirect=True)
NVTX_LISTENER = Path(__file__).parents[1] / "profiles" / "nvtx_listener.c"
LONG = GREEDY | {"max_tokens": 900, "ignore_eos": True}


@pytest.fixture(scope="module")
def model() -> Path:
    """The folder of the default model, assembled where it is not in the cache."""
    from flashhead_dist.models.cache import cache_root
    from flashhead_dist.models.default_model import default_model_folder

    return default_model_folder(cache_root())


@pytest.fixture(scope="module")
def dense_answers(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """Of a server with the plugin installed and not switched on."""
    log = tmp_path_factory.mktemp("dense") / "server.log"
    with Server(options(model, 1, None), log) as server:
        server.wait_ready()
        return Answers(server)


@pytest.fixture(scope="module")
def nvtx_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The log of servers' NVTX ranges; never written where there is no C compiler."""
    return tmp_path_factory.mktemp("nvtx") / "ranges.jsonl"


@pytest.fixture(scope="module")
def server(
    model: Path,
    dense_answers: Answers,
    nvtx_log: Path,
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> Iterator[Server]:
    """A server with FlashHead on `request.param` ranks, which leaves nothing behind."""
    from flashhead_dist.index import ensure_index
    from flashhead_dist.models import open_model

    folder, tp_size = tmp_path_factory.mktemp("flashhead"), request.param
    environment = {}
    if compiler := shutil.which("cc") or shutil.which("gcc"):
        library = folder / "listener.so"
        command = [compiler, "-shared", "-fPIC", str(NVTX_LISTENER), "-o", str(library)]
        subprocess.run(command, check=True)
        environment = {"NVTX_INJECTION64_PATH": str(library), "NVTX_LOG": str(nvtx_log)}
    index = str(ensure_index(open_model(None)))
    on = options(model, tp_size, {"index": index}, environment=environment)
    with Server(on, folder / "server.log") as server:
        server.wait_ready()
        processes, files = server.processes(), shared_memory(server)
        assert files
        yield server
    psutil.wait_procs(processes, timeout=60)
    assert [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE] == []
    left = [path for path in files if path.exists()]
    if tp_size > 1:
        # vLLM kills the workers of several CPU ranks as it ends, with FlashHead or without, and
        # their communicator then leaves 4 MB a rank.
        for path in [path for path in left if "-cpushm_" in path.name]:
            path.unlink()
            left.remove(path)
    assert left == []


def ranges(log: Path) -> list[dict[str, Any]]:
    """The NVTX ranges that began so far, as tests/profiles/nvtx_listener.c recorded them."""
    events = [json.loads(line) for line in log.read_text().splitlines()]
    return [event for event in events if event["event"] == "push"]


@ONE_RANK
@pytest.mark.parametrize("name", CASES)
def test_a_parameter_is_heard(server: Server, dense_answers: Answers, name: str) -> None:
    case = CASES[name]
    expected = texts(dense_answers[case.request])
    assert expected != texts(dense_answers[case.without]), "this case could not fail"
    before = counters(server)
    assert texts(ask(server, case.request)) == expected
    check_path(case, before, counters(server))


def check_path(case: Case, before: dict[str, float], after: dict[str, float]) -> None:
    """The dense path where it is needed, with its reason, and only there."""
    grown = {name: value - before.get(name, 0.0) for name, value in after.items()}
    fallbacks = {name: value for name, value in grown.items() if "fallbacks" in name and value}
    if case.reason is None:
        assert not fallbacks
        assert grown['steps_total{head="flashhead"}'] > 0
        assert grown["candidates_total"] > 0
    else:
        assert set(fallbacks) == {f'fallbacks_total{{reason="{case.reason}"}}'}
        assert grown['steps_total{head="dense"}'] == sum(fallbacks.values())


@ONE_RANK
def test_a_negative_logit_bias_bans_the_best_token(server: Server, dense_answers: Answers) -> None:
    (first, *_) = dense_answers[TOKEN_IDS]["choices"][0]["token_ids"]
    request = TOKEN_IDS | {"logit_bias": {str(first): -100.0}}
    ids = ask(server, request)["choices"][0]["token_ids"]
    assert first not in ids
    assert ask(server, TOKEN_IDS)["choices"][0]["token_ids"][0] == first


@ONE_RANK
def test_log_probabilities_are_the_dense_ones_but_for_the_estimate_of_log_z(
    server: Server, dense_answers: Answers
) -> None:
    """Were log Z of the candidates alone, they would be too great."""
    ours = ask(server, LOGPROBS)["choices"][0]
    dense = dense_answers[LOGPROBS]["choices"][0]
    assert ours["text"] == dense["text"]
    assert ours["logprobs"]["tokens"] == dense["logprobs"]["tokens"]
    found, wanted = (side["logprobs"]["token_logprobs"] for side in (ours, dense))
    assert found == pytest.approx(wanted, abs=0.02)
    for top, expected in zip(
        ours["logprobs"]["top_logprobs"], dense["logprobs"]["top_logprobs"], strict=True
    ):
        assert set(top) == set(expected)
        assert top == pytest.approx(expected, abs=0.02)


@ONE_RANK
def test_log_probabilities_of_the_prompt_take_the_dense_path(
    server: Server, dense_answers: Answers
) -> None:
    before = counters(server)
    ours = ask(server, PROMPT_LOGPROBS)["choices"][0]["prompt_logprobs"]
    wanted = dense_answers[PROMPT_LOGPROBS]["choices"][0]["prompt_logprobs"]
    grown = counters(server)
    name = 'fallbacks_total{reason="prompt_logprobs"}'
    assert grown[name] > before.get(name, 0.0)
    assert len(ours) == len(wanted)
    for own, dense in zip(ours[1:], wanted[1:], strict=True):
        assert set(own) == set(dense)
        for token, entry in dense.items():
            assert own[token]["logprob"] == pytest.approx(entry["logprob"], abs=1e-3)


@ONE_RANK
def test_the_best_token_of_a_drawn_text_varies_with_no_seed(server: Server) -> None:
    """Fails where draws are keyed by the request alone, or the temperature is ignored."""
    request = GREEDY | {"temperature": 1.5}
    found = {ask(server, request)["choices"][0]["text"] for _ in range(3)}
    assert len(found) > 1


@ONE_RANK
def test_ranges_of_the_head_reach_a_tool_from_the_worker(server: Server, nvtx_log: Path) -> None:
    """Payload: rows, so that a tool tells a step of one request from one of a batch."""
    if not nvtx_log.exists():
        pytest.skip("needs a C compiler")
    before = len(ranges(nvtx_log))
    ask(server, GREEDY)
    ask(server, CASES["positive logit_bias"].request)
    found = ranges(nvtx_log)[before:]
    assert {event["domain"] for event in found} == {"flashhead"}
    # A retrieval head has a range of its own within the layer's.
    heads = [e for e in found if e["message"].startswith("head:") and e["depth"] == 0]
    names = [event["message"] for event in heads]
    number = GREEDY["max_tokens"]
    assert names == ["head:flashhead_auto"] * number + ["head:dense"] * number
    assert {event["payload"] for event in heads} == {1}


def check_batch_and_cancelled_request(server: Server, dense_answers: Answers) -> None:
    """A batch of mixed requests is answered as the dense server answered them one by one.

    The rest of a cancelled request is not decoded, and the next request finds a clean row.
    """
    with ThreadPoolExecutor(len(MIXED)) as pool:
        found = list(pool.map(lambda request: texts(ask(server, request)), MIXED))
    assert found == [texts(dense_answers[request]) for request in MIXED]
    name = "vllm:generation_tokens_total"
    before = metric(server, name)
    pieces = stream(server, LONG)
    for _ in range(3):
        next(pieces)
    pieces.close()
    while metric(server, "vllm:num_requests_running"):
        time.sleep(0.1)
    assert metric(server, name) - before < LONG["max_tokens"]
    assert texts(ask(server, MIXED[0])) == texts(dense_answers[MIXED[0]])


def check_counters(server: Server, tp_size: int) -> None:
    """Steps are counted once, whatever the number of ranks; bytes cross only between ranks."""
    before = counters(server)
    ask(server, GREEDY)
    found = counters(server)
    growth = {name: found[name] - before.get(name, 0.0) for name in found}
    number = GREEDY["max_tokens"]
    assert growth['steps_total{head="flashhead"}'] == number
    assert growth['rows_total{head="flashhead"}'] == number
    assert number < growth["candidates_total"] < number * 262_144 / 2
    assert (growth.get("exchange_bytes_total", 0.0) > 0) == (tp_size > 1)


@ONE_RANK
def test_batches_and_counters_on_one_rank(server: Server, dense_answers: Answers) -> None:
    check_batch_and_cancelled_request(server, dense_answers)
    check_counters(server, 1)


@TWO_RANKS
def test_batches_and_counters_on_two_ranks(server: Server, dense_answers: Answers) -> None:
    check_batch_and_cancelled_request(server, dense_answers)
    check_counters(server, 2)


@TWO_RANKS
def test_a_worker_killed_during_a_request_ends_it_with_an_error(server: Server) -> None:
    """The client gets an error, and the server ends by itself. The last test of its server."""
    workers = [p for p in server.processes() if "VLLM::Worker" in " ".join(p.cmdline())]
    assert len(workers) == 2
    pieces = stream(server, LONG)
    next(pieces)
    workers[-1].kill()
    with pytest.raises((ConnectionError, HTTPException)):
        list(pieces)
    deadline = time.monotonic() + 600
    while server.returncode is None:
        assert time.monotonic() < deadline
        time.sleep(0.2)
