"""What generate draws from, and the values that it gives, with a head that probes little."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from flashhead_dist.errors import UserError
from flashhead_dist.heads.distribution import closed_form
from flashhead_dist.heads.sampling import token_log_probs
from flashhead_dist.integrations import transformers_generation as generation
from flashhead_dist.integrations.transformers_generation import SettleTokens
from flashhead_dist.integrations.transformers_head import RowKind, Session, open_session
from tests.integrations.transformers_models import PROMPT, VOCAB_SIZE
from tests.integrations.transformers_zoo import Pair, Zoo

FEW = 4
"""One probe a group: about a quarter of the mass lies in clusters that were not probed."""
DRAWS = 20_000


def first_draws(model: Any, **options: Any) -> Tensor:
    """int64 `[DRAWS]`: the first token that as many copies of the prompt are given."""
    prompt = torch.tensor([PROMPT])
    torch.manual_seed(5)
    settings: dict[str, Any] = {"top_k": 0, "max_new_tokens": 1, "do_sample": True}
    tokens = [
        model.generate(prompt.expand(2000, -1), **(settings | options))[:, -1]
        for _ in range(DRAWS // 2000)
    ]
    return torch.cat(tokens)


def misfit(drawn: Tensor, probabilities: Tensor) -> float:
    """Chi-square over tokens expected five times or more, the rest together, in standard deviations
    above its mean; infinite where a token of probability 0 was drawn."""
    counts = torch.bincount(drawn, minlength=VOCAB_SIZE).double()
    if bool((counts[probabilities == 0] > 0).any()):
        return float("inf")
    expected = probabilities.double() * len(drawn)
    often = expected >= 5
    counts = torch.cat([counts[often], counts[~often].sum().unsqueeze(0)])
    expected = torch.cat([expected[often], expected[~often].sum().unsqueeze(0)])
    kept = expected > 0
    statistic = float(((counts - expected) ** 2 / expected)[kept].sum())
    freedom = int(kept.sum()) - 1
    return (statistic - freedom) / (2 * freedom) ** 0.5


def form_of(pair: Pair, temperature: float, **options: Any) -> Tensor:
    """The head's distribution float32 `[V]` after the prompt, by the project's own closed form."""
    hidden = pair.last_hidden(torch.tensor([PROMPT]))
    form = closed_form(pair.head(**options), hidden, temperature=temperature)
    return form.unnormalized().softmax(-1)[0]


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
def test_draws_follow_the_closed_form(zoo: Zoo, temperature: float) -> None:
    pair = zoo.pair("llama")
    drawn = first_draws(pair.replaced(num_probes=FEW), temperature=temperature)
    assert misfit(drawn, form_of(pair, temperature, num_probes=FEW)) < 5


def test_unopened_and_dropped_clusters_would_show(zoo: Zoo, monkeypatch: Any) -> None:
    """The two likely bugs: drawing evenly within a cluster, and from the candidates alone."""
    pair = zoo.pair("llama")
    model, wanted = pair.replaced(num_probes=FEW), form_of(pair, 1.0, num_probes=FEW)
    found = model.retrieval_head.logit_rows.retrieve(pair.last_hidden(torch.tensor([PROMPT])))
    unprobed = 1 - float(wanted[found.token_ids[0][found.token_ids[0] < VOCAB_SIZE]].sum())
    assert 0.1 < unprobed < 0.6
    monkeypatch.setattr(generation.SettleTokens, "__call__", lambda _, __, scores: scores)
    assert misfit(first_draws(model, temperature=1.0), wanted) > 10

    def drop(self: Any, _: Tensor, scores: Tensor) -> Tensor:
        kept = torch.isin(torch.arange(VOCAB_SIZE), found.token_ids)
        return scores.masked_fill(~kept, float("-inf"))

    monkeypatch.setattr(generation.SettleTokens, "__call__", drop)
    assert misfit(first_draws(model, temperature=1.0), wanted) > 10


class CutsAll(LogitsProcessor):
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return torch.full_like(scores, float("-inf"))


def test_a_cluster_whose_exact_logits_are_all_cut_is_drawn_from_all_the_same(zoo: Zoo) -> None:
    """The estimate passed a threshold that the exact logits do not: without them, no token is
    left and the draw that follows fails."""
    pair = zoo.pair("llama")
    head = pair.replaced(num_probes=FEW).retrieval_head
    session = Session(head, RowKind.ESTIMATED, 0.5, greedy=False)
    with open_session(session):
        scores = head(pair.last_hidden(torch.tensor([PROMPT])).expand(50, -1).contiguous()) / 0.5
    assert session.found is not None
    found, tokens = session.found, torch.arange(VOCAB_SIZE)
    scores[:, torch.isin(tokens, found.token_ids)] = float("-inf")
    torch.manual_seed(0)
    settled = SettleTokens(session, [CutsAll()], one_by_one=False)(torch.zeros(50, 1), scores)
    logits = pair.dense(torch.tensor([PROMPT])).logits[0, -1]
    for row in settled:
        left = row.isfinite().nonzero()[:, 0]
        assert len(head.logit_rows.cluster_of_token[left].unique()) == 1
        wanted = (logits[left] / 0.5).log_softmax(0)
        assert torch.allclose(row[left].log_softmax(0), wanted, atol=1e-4)


PROCESSORS = {
    "top_k": ({"top_k": 6}, [TopKLogitsWarper(6)]),
    "top_p": ({"top_p": 0.5}, [TopPLogitsWarper(0.5)]),
    "min_p": ({"min_p": 0.1}, [MinPLogitsWarper(0.1)]),
    "penalty": (
        {"repetition_penalty": 1.5, "temperature": 0.8},
        [RepetitionPenaltyLogitsProcessor(1.5), TemperatureLogitsWarper(0.8)],
    ),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_processors_act_on_what_is_drawn(zoo: Zoo, name: str) -> None:
    """The thresholds fall among the candidates here, so the closed form is cut in the same place;
    a penalty reaches tokens that were not scored, which is why more is probed for it."""
    options, processors = PROCESSORS[name]
    pair, probes = zoo.pair("llama"), 32
    hidden = pair.last_hidden(torch.tensor([PROMPT]))
    temperature = options.get("temperature", 1.0)
    form = closed_form(pair.head(num_probes=probes), hidden, temperature=temperature)
    values = form.unnormalized() * temperature
    scores = LogitsProcessorList(processors)(torch.tensor([PROMPT]), values)
    drawn = first_draws(pair.replaced(num_probes=probes), **options)
    assert misfit(drawn, scores.softmax(-1)[0]) < 5
    assert misfit(drawn, form_of(pair, 1.0, num_probes=probes)) > 10


@pytest.mark.parametrize(
    "sampling", [{"do_sample": False}, {"do_sample": True, "temperature": 0.7}]
)
def test_values_are_the_closed_form(zoo: Zoo, sampling: dict[str, Any]) -> None:
    pair = zoo.pair("qwen2")
    head = pair.head()
    model = pair.replaced()
    prompt = torch.tensor([PROMPT])
    settings: dict[str, Any] = {"max_new_tokens": 5, "top_k": 0, "return_dict_in_generate": True}
    torch.manual_seed(1)
    found = model.generate(prompt, output_scores=True, **settings, **sampling)
    temperature = sampling.get("temperature", 1.0)
    for step, scores in enumerate(found.scores):
        hidden = pair.last_hidden(found.sequences[:, : len(PROMPT) + step])
        wanted = closed_form(head, hidden, temperature=temperature).unnormalized()
        assert torch.allclose(scores.log_softmax(-1), wanted.log_softmax(-1), atol=2e-4)
    found = model.generate(prompt, output_logits=True, **settings, **sampling)
    for step, logits in enumerate(found.logits):
        hidden = pair.last_hidden(found.sequences[:, : len(PROMPT) + step])
        every = torch.arange(VOCAB_SIZE)
        wanted = token_log_probs(head, hidden.expand(VOCAB_SIZE, -1).contiguous(), every)
        assert torch.allclose(logits.log_softmax(-1)[0], wanted.float(), atol=2e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": False, "repetition_penalty": 1.3},
        {"do_sample": True, "temperature": 1.4, "top_k": 0},
        {"do_sample": False, "prompt_lookup_num_tokens": 3},
    ],
)
def test_asking_for_logits_leaves_the_text(zoo: Zoo, options: dict[str, Any]) -> None:
    """Their argmax is another token than the head's wherever the retrieval missed the best, which
    it often does with so much of the spread in the probing score."""
    pair, probing = zoo.pair("llama"), {"num_probes": FEW, "alpha": 30.0}
    model, prompt = pair.replaced(**probing), torch.tensor([PROMPT])
    settings = {"max_new_tokens": 24} | options
    torch.manual_seed(2)
    wanted = model.generate(prompt, **settings)
    torch.manual_seed(2)
    found = model.generate(prompt, output_logits=True, return_dict_in_generate=True, **settings)
    assert torch.equal(found.sequences, wanted)
    new = wanted[0, len(PROMPT) :].tolist()
    best = [int(logits.argmax()) for logits in found.logits]
    assert best != new
    hidden = pair.last_hidden(wanted[:, : len(PROMPT) + 3])
    values = closed_form(pair.head(**probing), hidden).unnormalized()
    assert torch.allclose(found.logits[3], values, atol=1e-4)


class Spy(LogitsProcessor):
    """Reads values, so it must be shown the closed form."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.seen.append(scores.clone())
        return scores


def test_an_unknown_processor_sees_the_closed_form(zoo: Zoo) -> None:
    pair, spy = zoo.pair("llama"), Spy()
    model = pair.replaced(num_probes=FEW)
    model.generate(
        torch.tensor([PROMPT]), logits_processor=[spy], max_new_tokens=1, do_sample=True, top_k=0
    )
    wanted = form_of(pair, 1.0, num_probes=FEW)
    assert torch.allclose(spy.seen[0].softmax(-1)[0], wanted, atol=1e-5)


def test_error_is_raised_instead_of_values(zoo: Zoo) -> None:
    model = zoo.pair("llama").replaced(full_logits="error")
    prompt = torch.tensor([PROMPT])
    model.generate(prompt, max_new_tokens=4, do_sample=True, temperature=0.7)
    model.generate(prompt, max_new_tokens=4, do_sample=False, repetition_penalty=1.2)
    readers: list[dict[str, Any]] = [
        {"output_logits": True, "return_dict_in_generate": True},
        {"output_scores": True, "return_dict_in_generate": True},
        {"logits_processor": [Spy()]},
        {"num_beams": 2},
        {"guidance_scale": 1.5},
    ]
    for reader in readers:
        with pytest.raises(UserError, match="closed_form"):
            model.generate(prompt, max_new_tokens=4, do_sample=False, **reader)
    with pytest.raises(UserError, match="closed_form"):
        model(prompt)


def test_other_modes_work_on_the_closed_form(zoo: Zoo) -> None:
    """Beams and guidance read values: probing every cluster gives the dense model's text."""
    pair = zoo.pair("llama")
    model = pair.replaced(num_probes=pair.head().index.manifest.num_clusters)
    prompt = torch.tensor([PROMPT])
    for options in ({"num_beams": 3}, {"guidance_scale": 1.5}):
        found = model.generate(prompt, max_new_tokens=8, do_sample=False, **options)
        wanted = pair.dense.generate(prompt, max_new_tokens=8, do_sample=False, **options)
        assert torch.equal(found, wanted)
