"""The divergence of the closed form from the dense softmax against a sum over the vocabulary."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flashhead_dist.errors import UserError
from flashhead_dist.evaluate import divergence
from flashhead_dist.evaluate.divergence import (
    evaluate_divergence,
    evaluate_likelihood,
    predict_tokens,
)
from flashhead_dist.heads.base import Head
from flashhead_dist.heads.distribution import closed_form
from flashhead_dist.heads.registry import build_head, emulate_head
from flashhead_dist.heads.sampling import token_log_probs
from flashhead_dist.models import ModelSource, OutputContract, open_model
from flashhead_dist.parallel import TensorParallel
from flashhead_dist.states.split import Document


@pytest.fixture(scope="module")
def model(tied_model: Path) -> ModelSource:
    return open_model(str(tied_model))


@pytest.fixture(scope="module")
def states() -> torch.Tensor:
    """From nearly flat distributions to sharp ones."""
    draw = torch.Generator().manual_seed(5)
    scale = torch.linspace(0.05, 0.6, 90).unsqueeze(1)
    return (scale * torch.randn(90, 64, generator=draw)).to(torch.bfloat16)


def head_of(model: ModelSource, index: Path | None, name: str = "flashhead") -> Head:
    probes = 8 if name == "flashhead" else None
    tp = TensorParallel.single()
    return build_head(name, tp=tp, model=model, index_dir=index, num_probes=probes)


def brute_force(head: Head, model: ModelSource, states: torch.Tensor) -> torch.Tensor:
    """The sum over every token of p (log p - log q), in float64."""
    softcap = model.contract.softcap
    logits = states.double() @ model.read_rows(0, model.vocab_size).double().T
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    own = closed_form(head, states, contract=model.contract).unnormalized().double().log_softmax(1)
    log_p = logits.log_softmax(1)
    return (log_p.exp() * (log_p - own)).sum(1)


@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_it_is_the_sum_over_the_vocabulary(
    model: ModelSource, tied_index: Path, states: torch.Tensor, softcap: float
) -> None:
    """Fails where m_c and L_c trade places, or pads or pinned tokens are counted in a cluster."""
    capped = replace(model, find_contract=lambda: OutputContract(softcap=softcap))
    head = head_of(model, tied_index)
    found = evaluate_divergence(head, capped, states, progress=False)
    expected = brute_force(head, capped, states)
    assert float(expected.max()) > 0.01
    torch.testing.assert_close(found.kl, expected, rtol=1e-4, atol=2e-5)
    assert bool((found.kl > -2e-5).all())
    assert float(found.scored_mass.min()) < 0.5
    assert bool((found.scored_mass <= 1 + 1e-9).all())


def test_blocks_and_far_references_change_nothing(
    model: ModelSource, tied_index: Path, states: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = head_of(model, tied_index)
    whole = evaluate_divergence(head, model, states, progress=False)
    monkeypatch.setattr(divergence, "_ROWS", 100)
    monkeypatch.setattr(divergence, "_STATES", 32)
    monkeypatch.setattr(divergence, "_FORM_STATES", 20)
    # Scaled anew at nearly every block of rows.
    monkeypatch.setattr(divergence, "_HEADROOM", -1.0)
    pieces = evaluate_divergence(head, model, states, progress=False)
    torch.testing.assert_close(pieces.kl, whole.kl, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(pieces.scored_mass, whole.scored_mass, rtol=1e-4, atol=1e-5)


def test_it_is_the_same_at_every_tp_size_and_zero_for_the_dense_head(
    model: ModelSource, tied_index: Path, states: torch.Tensor
) -> None:
    one = evaluate_divergence(head_of(model, tied_index), model, states, progress=False)
    three = emulate_head("flashhead", tp_size=3, model=model, index_dir=tied_index, num_probes=8)
    found = evaluate_divergence(three, model, states, progress=False)
    torch.testing.assert_close(found.kl, one.kl, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(found.scored_mass, one.scored_mass, rtol=1e-5, atol=1e-6)
    dense = head_of(model, None, "dense_local_max")
    exact = evaluate_divergence(dense, model, states, progress=False)
    assert float(exact.kl.abs().max()) < 2e-5
    assert float(exact.scored_mass.min()) == 1


def test_log_probs_are_those_of_both_heads(
    model: ModelSource, tied_index: Path, states: torch.Tensor
) -> None:
    tokens = torch.randint(1013, (90,), generator=torch.Generator().manual_seed(7))
    tokens[:3] = torch.tensor([1005, 900, 612])  # pinned
    head = head_of(model, tied_index)
    found = evaluate_divergence(head, model, states, tokens, progress=False)
    assert found.dense_log_probs is not None
    assert found.head_log_probs is not None
    logits = states.double() @ model.read_rows(0, 1013).double().T
    dense = logits.log_softmax(1).gather(1, tokens.unsqueeze(1))[:, 0]
    torch.testing.assert_close(found.dense_log_probs, dense, rtol=1e-5, atol=1e-5)
    own = token_log_probs(head, states, tokens)
    torch.testing.assert_close(found.head_log_probs.float(), own, rtol=1e-5, atol=1e-5)


def test_a_head_without_a_closed_form_is_refused(
    model: ModelSource, tied_index: Path, states: torch.Tensor
) -> None:
    head = head_of(model, tied_index, "flashhead_global")
    with pytest.raises(UserError, match="flashhead_global does not sample"):
        evaluate_divergence(head, model, states, progress=False)


def test_perplexity_of_texts_by_document(model: ModelSource, tied_index: Path) -> None:
    """Each token is predicted from the state before it, and each state knows its document."""

    class Tokenizer:
        bos_token_id = 2

        def __call__(self, text: str) -> SimpleNamespace:
            return SimpleNamespace(input_ids=[2, *map(ord, text)])

    class Body(torch.nn.Module):
        """A token's state is its row."""

        dtype = torch.bfloat16

        def get_decoder(self) -> Body:
            return self

        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
            rows = model.read_rows(0, 1013) / 2
            return SimpleNamespace(last_hidden_state=rows[input_ids])

    lettered = replace(model, body_loader=lambda dtype: (Body(), Tokenizer()))
    documents = [Document("a", "1", "abc"), Document("b", "2", "xy"), Document("a", "3", "de")]
    found = predict_tokens(lettered, documents, max_tokens=100, origin="three", progress=False)
    hidden = found.hidden_states
    assert found.token_ids.tolist() == [*map(ord, "abc"), *map(ord, "xy"), *map(ord, "de")]
    assert hidden.documents is not None
    assert hidden.documents.tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert [hidden.sources[n] for n in hidden.source_ids] == list("aaabbaa")
    # Evenly: the first window of another document comes before the second of the same.
    long = [Document("a", "1", "abc" * 50), Document("b", "2", "x" * 90), Document("a", "3", "de")]
    few = predict_tokens(
        lettered, long, max_tokens=189, evenly=True, origin="three", progress=False
    )
    assert few.hidden_states.documents is not None
    assert (
        few.hidden_states.documents.tolist() == [0] * 63 + [1] * 63 + [2] * 2 + [1] * 27 + [0] * 34
    )
    head = head_of(model, tied_index)
    likelihood = evaluate_likelihood(head, model, found, progress=False)
    before = torch.tensor([2, *map(ord, "ab"), 2, ord("x"), 2, ord("d")])
    rows = model.read_rows(0, 1013)
    logits = (rows[before] / 2).double() @ rows.double().T
    dense = logits.log_softmax(1).gather(1, found.token_ids.unsqueeze(1)).mean()
    assert likelihood["dense_perplexity"] == pytest.approx(math.exp(-float(dense)), rel=1e-4)
    assert likelihood["num_tokens"] == 7
