"""One OpenAI server with FlashHead: every sampling parameter, batches, cancelled requests, ranges.

The dense server and this one run in float32 under the same seeds. The dense server's answers with
and without a parameter differ, so a parameter that is ignored shows.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from flashhead_dist.serving.server import Server
from tests.vllm.server_answers import LOGPROBS, PROMPT_LOGPROBS, TOKEN_IDS, Answers
from tests.vllm.server_checks import (
    check_batch_of_mixed_requests,
    check_cancelled_request,
    check_counters,
    ranges_of,
)
from tests.vllm.server_requests import CASES, GREEDY, Case, texts
from tests.vllm.serving import NEEDS_VLLM, ask, counters

pytestmark = NEEDS_VLLM
TP_SIZE = 1


@pytest.mark.parametrize("name", CASES)
def test_a_parameter_is_heard(flashhead_server: Server, dense_answers: Answers, name: str) -> None:
    case = CASES[name]
    expected = texts(dense_answers[case.request])
    assert expected != texts(dense_answers[case.without]), "this case could not fail"
    before = counters(flashhead_server)
    assert texts(ask(flashhead_server, case.request)) == expected
    check_path(case, before, counters(flashhead_server))


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


def test_a_negative_logit_bias_bans_the_best_token(
    flashhead_server: Server, dense_answers: Answers
) -> None:
    (first, *_) = dense_answers[TOKEN_IDS]["choices"][0]["token_ids"]
    request = TOKEN_IDS | {"logit_bias": {str(first): -100.0}}
    ids = ask(flashhead_server, request)["choices"][0]["token_ids"]
    assert first not in ids
    assert ask(flashhead_server, TOKEN_IDS)["choices"][0]["token_ids"][0] == first


def test_log_probabilities_are_the_dense_ones_but_for_the_estimate_of_log_z(
    flashhead_server: Server, dense_answers: Answers
) -> None:
    """Were log Z of the candidates alone, they would be too great."""
    ours = ask(flashhead_server, LOGPROBS)["choices"][0]
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


def test_log_probabilities_of_the_prompt_take_the_dense_path(
    flashhead_server: Server, dense_answers: Answers
) -> None:
    before = counters(flashhead_server)
    ours = ask(flashhead_server, PROMPT_LOGPROBS)["choices"][0]["prompt_logprobs"]
    wanted = dense_answers[PROMPT_LOGPROBS]["choices"][0]["prompt_logprobs"]
    grown = counters(flashhead_server)
    name = 'fallbacks_total{reason="prompt_logprobs"}'
    assert grown[name] > before.get(name, 0.0)
    assert len(ours) == len(wanted)
    for own, dense in zip(ours[1:], wanted[1:], strict=True):
        assert set(own) == set(dense)
        for token, entry in dense.items():
            assert own[token]["logprob"] == pytest.approx(entry["logprob"], abs=1e-3)


def test_the_best_token_of_a_drawn_text_varies_with_no_seed(flashhead_server: Server) -> None:
    """Fails where draws are keyed by the request alone, or the temperature is ignored."""
    request = GREEDY | {"temperature": 1.5}
    found = {ask(flashhead_server, request)["choices"][0]["text"] for _ in range(3)}
    assert len(found) > 1


def test_a_batch_of_mixed_requests(flashhead_server: Server, dense_answers: Answers) -> None:
    check_batch_of_mixed_requests(flashhead_server, dense_answers)


def test_a_cancelled_request(flashhead_server: Server, dense_answers: Answers) -> None:
    check_cancelled_request(flashhead_server, dense_answers)


def test_counters_of_one_rank(flashhead_server: Server) -> None:
    check_counters(flashhead_server, TP_SIZE)


def test_ranges_of_the_head_reach_a_tool_from_the_worker(
    flashhead_server: Server, nvtx_log: Path
) -> None:
    """Payload: rows, so that a tool tells a step of one request from one of a batch."""
    if not nvtx_log.exists():
        pytest.skip("needs a C compiler")
    before = len(ranges_of(nvtx_log))
    ask(flashhead_server, GREEDY)
    ask(flashhead_server, CASES["positive logit_bias"].request)
    found = ranges_of(nvtx_log)[before:]
    assert {event["domain"] for event in found} == {"flashhead"}
    # A retrieval head has a range of its own within the layer's.
    heads = [e for e in found if e["message"].startswith("head:") and e["depth"] == 0]
    names = [event["message"] for event in heads]
    number = GREEDY["max_tokens"]
    assert names == ["head:flashhead_auto"] * number + ["head:dense"] * number
    assert {event["payload"] for event in heads} == {1}
