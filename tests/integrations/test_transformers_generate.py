"""model.generate with a retrieval head: batches, what ends a text, what forbids tokens."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from flashhead_dist.errors import UserError
from flashhead_dist.integrations.transformers_rows import RowParts
from tests.integrations.transformers_models import PROMPT
from tests.integrations.transformers_zoo import Pair, Zoo

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 16}


class Collector(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


class SeenThrice(StoppingCriteria):
    """Ends a text whose new tokens hold one token three times."""

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        new = input_ids[:, len(PROMPT) :].tolist()
        done = [max(map(row.count, row), default=0) >= 3 for row in new]
        return torch.tensor(done, device=input_ids.device)


def padded(prompts: list[list[int]]) -> dict[str, Tensor]:
    length = max(map(len, prompts))
    ids = [[0] * (length - len(p)) + p for p in prompts]
    mask = [[0] * (length - len(p)) + [1] * len(p) for p in prompts]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


@pytest.mark.parametrize("kind", ["gemma3", "llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("more", [{}, {"repetition_penalty": 1.4}], ids=["plain", "penalty"])
def test_a_left_padded_batch_gives_each_its_own_text(
    zoo: Zoo, kind: str, more: dict[str, Any]
) -> None:
    """Rows settled in another sequence's place, or at a pad's position, would mix the texts."""
    pair = zoo.pair(kind)
    model = pair.replaced()
    prompts = [PROMPT, [7, 8], [400, 2, 31, 99]]
    found = model.generate(**padded(prompts), **GREEDY, **more)
    for row, prompt in enumerate(prompts):
        alone = model.generate(torch.tensor([prompt]), **GREEDY, **more)[0].tolist()
        text = found[row, max(map(len, prompts)) :].tolist()
        wanted = alone[len(prompt) :]
        assert text[: len(wanted)] == wanted
        assert set(text[len(wanted) :]) <= {0}
        if not more:
            assert alone == pair.greedy(prompt, 16)


def test_stopping_criteria_and_streamers(zoo: Zoo) -> None:
    pair, collector = zoo.pair("qwen3"), Collector()
    text = pair.greedy(PROMPT, 40)
    new = text[len(PROMPT) :]
    ends = next(i for i in range(1, len(new) + 1) if max(map(new[:i].count, new[:i])) >= 3)
    found = pair.replaced().generate(
        torch.tensor([PROMPT]),
        do_sample=False,
        max_new_tokens=40,
        stopping_criteria=StoppingCriteriaList([SeenThrice()]),
        streamer=collector,
    )
    assert found[0].tolist() == text[: len(PROMPT) + ends]
    assert collector.tokens == found[0].tolist()
    assert collector.ended


PROMPTS = [[5, 17, place] for place in range(20, 32)]


def state_of(pair: Pair, model: Any, prompt: list[int]) -> tuple[Tensor, RowParts, Tensor]:
    """The dense model's logits `[V]`, what the head retrieves, and its estimates `[V]`."""
    ids = torch.tensor([prompt])
    rows = model.retrieval_head.logit_rows
    found = rows.retrieve(pair.last_hidden(ids), greedy=True)
    return pair.dense(ids).logits[0, -1], found, rows.estimated(found, below_best=True)[0]


@torch.no_grad()
def test_a_few_allowed_tokens_are_compared_exactly(zoo: Zoo) -> None:
    """None of them need be a candidate: by estimates alone the wrong one would win."""
    pair = zoo.pair("llama")
    model = pair.replaced(num_probes=4)
    wrong_by_estimate = 0
    for prompt in PROMPTS:
        logits, found, estimates = state_of(pair, model, prompt)
        allowed = torch.randperm(len(logits), generator=torch.Generator().manual_seed(0))[:30]
        allowed = allowed[~torch.isin(allowed, found.token_ids)][:12]
        wanted = int(allowed[logits[allowed].argmax()])
        wrong_by_estimate += int(allowed[estimates[allowed].argmax()]) != wanted

        def allow(*_: Any, ids: Tensor = allowed) -> list[int]:
            return ids.tolist()

        text = model.generate(
            torch.tensor([prompt]),
            do_sample=False,
            max_new_tokens=1,
            prefix_allowed_tokens_fn=allow,
        )
        assert int(text[0, -1]) == wanted
    assert wrong_by_estimate > 2


@torch.no_grad()
def test_an_estimate_never_wins_unopened(zoo: Zoo) -> None:
    """With every candidate forbidden, clusters are opened, the best by estimate first, until a
    scored token leads: the best of all opened, and above the estimates of those that are not."""
    pair = zoo.pair("llama")
    model = pair.replaced(num_probes=4)
    rows = model.retrieval_head.logit_rows
    wrong_by_estimate = 0
    for prompt in PROMPTS:
        logits, found, estimates = state_of(pair, model, prompt)
        forbidden = found.token_ids[0][found.token_ids[0] < rows.vocab_size]
        estimates[forbidden] = float("-inf")
        text = model.generate(
            torch.tensor([prompt]),
            do_sample=False,
            max_new_tokens=1,
            suppress_tokens=forbidden.tolist(),
        )
        token = int(text[0, -1])
        clusters = rows.cluster_of_token[:-1]
        allowed = logits.clone()
        allowed[forbidden] = float("-inf")
        wanted, leading = -1, estimates.clone()
        while leading.isfinite().any():
            cluster = clusters[leading.argmax()]
            if wanted >= 0 and float(allowed[wanted]) > float(leading.max()):
                break
            fellows = (clusters == cluster).nonzero()[:, 0]
            leading[fellows] = float("-inf")
            best = int(fellows[allowed[fellows].argmax()])
            if wanted < 0 or allowed[best] > allowed[wanted]:
                wanted = best
        assert token == wanted
        wrong_by_estimate += int(estimates.argmax()) != token
    assert wrong_by_estimate > 2


@pytest.mark.parametrize("alpha", [0.0, 30.0])
def test_a_processor_that_does_nothing_changes_nothing(zoo: Zoo, alpha: float) -> None:
    """With so much of the spread in the score, clusters of a greater mean than all candidates stay
    unprobed; the head does not choose them, and so their estimates may not lead either."""
    pair = zoo.pair("llama")
    model = pair.replaced(num_probes=4, alpha=alpha)
    above = 0
    for prompt in PROMPTS:
        _, found, _ = state_of(pair, model, prompt)
        estimates = model.retrieval_head.logit_rows.estimated(found, below_best=False)
        above += int(estimates.argmax()) not in found.token_ids
        ids = torch.tensor([prompt])
        plain = model.generate(ids, **GREEDY)
        assert torch.equal(model.generate(ids, no_repeat_ngram_size=30, **GREEDY), plain)
    assert (above > 2) == (alpha > 0)


class AsksAnother(LogitsProcessor):
    """Reads another replaced model in the middle of a decoding step, and leaves the scores."""

    def __init__(self, other: Any) -> None:
        self.other = other
        self.answers: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.answers.append(self.other(torch.tensor([PROMPT])).logits)
        return scores


def test_a_session_is_for_its_own_head_alone(zoo: Zoo) -> None:
    model, other = zoo.pair("llama").replaced(), zoo.pair("qwen2").replaced()
    with torch.no_grad():
        wanted = other(torch.tensor([PROMPT])).logits
    asks = AsksAnother(other)
    model.generate(
        torch.tensor([PROMPT]),
        do_sample=True,
        temperature=0.4,
        max_new_tokens=2,
        logits_processor=[asks],
    )
    assert all(torch.equal(answer, wanted) for answer in asks.answers)


def test_two_threads_generate_at_once(zoo: Zoo) -> None:
    """A session belongs to its thread: rows kept on the head would cross over."""
    pair = zoo.pair("gemma3")
    model = pair.replaced()
    prompts = [PROMPT, [400, 2, 31, 99]]
    options = {"do_sample": False, "max_new_tokens": 48, "repetition_penalty": 1.3}
    wanted = [model.generate(torch.tensor([p]), **options) for p in prompts]
    found: list[Tensor] = [torch.empty(0)] * 2

    def work(place: int) -> None:
        found[place] = model.generate(torch.tensor([prompts[place]]), **options)

    threads = [threading.Thread(target=work, args=(place,)) for place in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.3}, {"do_sample": True}])
def test_a_broken_hidden_state_is_refused(zoo: Zoo, options: dict[str, Any]) -> None:
    model = zoo.pair("llama").replaced()
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    with pytest.raises(UserError, match="NaN"):
        model.generate(torch.tensor([PROMPT]), **(GREEDY | options))


def test_a_forgotten_session_does_not_outlive_its_loop(zoo: Zoo) -> None:
    """After generate, and after one that failed, a forward pass gives the closed form again."""
    pair = zoo.pair("llama")
    model, prompt = pair.replaced(), torch.tensor([PROMPT])
    with torch.no_grad():
        wanted = model(prompt).logits
    model.generate(prompt, **GREEDY)

    class Fails(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
            raise KeyError("on purpose")

    with pytest.raises(KeyError):
        model.generate(prompt, stopping_criteria=StoppingCriteriaList([Fails()]), **GREEDY)
    with torch.no_grad():
        assert torch.equal(model(prompt).logits, wanted)
