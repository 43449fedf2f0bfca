"""That draws come from the distribution that is stated, and that the likely bugs would be seen.

A chi-square over thousands of draws of one flat hidden state, with few clusters probed. Seeds are
fixed, so a p-value is the same at every run.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flashhead_dist.errors import UserError
from flashhead_dist.evaluate.sampling import evaluate_sampling, top_chi_square
from flashhead_dist.heads.base import Head
from flashhead_dist.heads.distribution import ClosedForm, closed_form
from flashhead_dist.heads.flashhead import FlashHead
from flashhead_dist.heads.registry import HeadBuilder, emulate_head
from flashhead_dist.heads.sampling import (
    SamplingParameters,
    choose_tokens,
    token_log_probs,
    within_mass,
)
from flashhead_dist.models import open_model
from flashhead_dist.parallel import TensorParallel
from flashhead_kernels import cpu_sampling
from flashhead_kernels.keys import unpack_keys
from flashhead_kernels.noise import GumbelNoise

DRAWS = 30_000


@pytest.fixture(scope="module")
def heads(tied_model: Path, tied_index: Path) -> dict[str, Head]:
    """flashhead draws with two probes a group: enough of the mass lies in unprobed clusters."""
    model = open_model(str(tied_model))
    builder = HeadBuilder(tp=TensorParallel.single(), model=model, index_dir=tied_index)
    flashhead = builder.build("flashhead", num_probes=8)
    assert isinstance(flashhead, FlashHead)
    assert flashhead.sampling_probes == 12
    return {"flashhead": flashhead, "dense_local_max": builder.build("dense_local_max")}


@pytest.fixture(scope="module")
def state() -> torch.Tensor:
    draw = torch.Generator().manual_seed(2)
    return 0.15 * torch.randn(1, 64, generator=draw)


def test_a_draw_scores_half_as_many_clusters_again_as_a_greedy_step(
    heads: dict[str, Head], state: torch.Tensor
) -> None:
    """8 groups: one probe each for the best token; for a draw two, of 4 tokens each, and a pin."""
    flashhead = heads["flashhead"]
    assert isinstance(flashhead, FlashHead)
    assert flashhead.num_probes == flashhead.num_groups == 8
    assert closed_form(flashhead, state).logits.shape == (1, 8 * (2 * 4 + 1))


def noise_of(count: int, *, each: int = 1) -> GumbelNoise:
    """`each`: draws that share a position, as a bug would have it."""
    return GumbelNoise(1, torch.arange(count) // each, torch.full((count,), 5))


def counts(form: ClosedForm, noise: GumbelNoise) -> torch.Tensor:
    tokens = unpack_keys(form.draw(noise, torch.zeros_like(noise.positions)))[1]
    return torch.bincount(tokens, minlength=1013).double()


def probabilities(form: ClosedForm) -> torch.Tensor:
    return form.unnormalized()[0].double().softmax(0)


@pytest.mark.parametrize("name", ["flashhead", "dense_local_max"])
@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_draws_are_from_the_closed_form(
    heads: dict[str, Head], state: torch.Tensor, name: str, temperature: float
) -> None:
    form = closed_form(heads[name], state, temperature=temperature)
    _, p_value = top_chi_square(counts(form, noise_of(DRAWS)), probabilities(form), top=800)
    assert p_value > 1e-3


def test_the_likely_bugs_fail_that_test(
    heads: dict[str, Head], state: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = closed_form(heads["flashhead"], state)
    expected = probabilities(form)
    unprobed = 1 - float((form.logits.double().logsumexp(1) - form.log_normalizer()).exp())
    assert unprobed > 0.5
    reused = counts(form, noise_of(DRAWS, each=2))
    assert top_chi_square(reused, expected, top=800)[1] < 1e-6
    empty = torch.full_like(form.log_mass, float("-inf"))
    dropped = replace(form, log_mass=empty, group_log_mass=empty.amax(2))
    assert top_chi_square(counts(dropped, noise_of(DRAWS)), expected, top=800)[1] < 1e-6
    # The best token of the cluster that is opened, instead of one drawn from it.
    monkeypatch.setattr(cpu_sampling, "gumbel", lambda noise, ids: torch.zeros(ids.shape))
    assert top_chi_square(counts(form, noise_of(DRAWS)), expected, top=800)[1] < 1e-6


def test_the_closed_form_is_near_the_dense_distribution(
    heads: dict[str, Head], state: torch.Tensor
) -> None:
    """Without the unprobed clusters the distance is more than three times as great."""
    found = probabilities(closed_form(heads["flashhead"], state))
    dense = probabilities(closed_form(heads["dense_local_max"], state))
    form = closed_form(heads["flashhead"], state)
    dropped = torch.full_like(dense, float("-inf"))
    ids = form.token_ids[0][form.token_ids[0] >= 0].long()
    dropped[ids] = form.logits[0][form.token_ids[0] >= 0].double()
    distance = float((found - dense).abs().sum() / 2)
    without = float((dropped.softmax(0) - dense).abs().sum() / 2)
    assert 3 * distance < without


def test_both_heads_draw_the_same_where_the_winner_was_scored(heads: dict[str, Head]) -> None:
    """What lossless sampling rests on."""
    draw = torch.Generator().manual_seed(4)
    states = 2 * torch.randn(400, 64, generator=draw)
    parameters = SamplingParameters(temperature=1.0, seed=9)
    places = (torch.arange(400), torch.arange(400) % 7)
    found, dense = (
        choose_tokens(heads[name], states, *places, parameters)
        for name in ("flashhead", "dense_local_max")
    )
    form = closed_form(heads["flashhead"], states)
    scored = (form.token_ids == dense.unsqueeze(1)).any(1)
    opened = ~(form.token_ids == found.unsqueeze(1)).any(1)
    assert int(scored.sum()) > 250
    assert torch.equal(found[scored & ~opened], dense[scored & ~opened])
    assert float((found == dense).double().mean()) > 0.6


def test_top_k_draws_among_the_k_best_only(heads: dict[str, Head], state: torch.Tensor) -> None:
    rows = state.expand(4000, -1)
    places = (torch.arange(4000), torch.zeros(4000, dtype=torch.int64))
    for name, head in heads.items():
        best = head(state, k=5)
        tokens = choose_tokens(head, rows, *places, SamplingParameters(temperature=1.0, top_k=5))
        expected = torch.zeros(1013, dtype=torch.float64)
        expected[best.token_ids[0]] = best.logits[0].double().softmax(0)
        drawn = torch.bincount(tokens, minlength=1013).double()
        assert set(tokens.tolist()) == set(best.token_ids[0].tolist()), name
        assert top_chi_square(drawn, expected, top=4)[1] > 1e-3


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("name", ["flashhead", "dense_local_max"])
def test_top_p_draws_from_the_nucleus(
    heads: dict[str, Head], state: torch.Tensor, name: str, top_p: float
) -> None:
    """0.9 of this flat state reaches past what flashhead scored: clusters enter whole."""
    rows = state.expand(3000, -1)
    places = (torch.arange(3000), torch.zeros(3000, dtype=torch.int64))
    parameters = SamplingParameters(temperature=1.0, top_p=top_p)
    tokens = choose_tokens(heads[name], rows, *places, parameters)
    form = closed_form(heads[name], state)
    every = probabilities(form)
    drawn = torch.zeros(1013, dtype=torch.bool)
    drawn[tokens] = True
    scored = torch.zeros(1013, dtype=torch.bool)
    scored[form.token_ids[form.token_ids >= 0].long()] = True
    if float(every[scored].sum()) > top_p:
        order = every.masked_fill(~scored, 0).argsort(descending=True, stable=True)
        needed = int((every[order].cumsum(0) < top_p).sum()) + 1
        assert set(tokens.tolist()) <= set(order[:needed].tolist())
        # The next token would have been drawn some time, had it been let in.
        assert float(every[order[:needed]].sum()) < top_p + float(every.max())
    else:
        assert name == "flashhead"
        assert int((drawn & ~scored).sum()) > 20
        assert float(every[drawn].sum()) < top_p + 0.02


def test_within_mass_keeps_the_fewest() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05], [1.0, 0.0, 0.0, 0.0]]).log()
    assert within_mass(logits, 0.79).tolist() == [[True, True, False, False], [True] + [False] * 3]
    assert within_mass(logits, 0.81)[0].tolist() == [True, True, True, False]
    assert within_mass(logits, 0.01)[0].tolist() == [True, False, False, False]


def test_evaluation_compares_with_dense_draws(
    heads: dict[str, Head], tied_model: Path, tied_index: Path, state: torch.Tensor
) -> None:
    model = open_model(str(tied_model))
    emulated = [
        emulate_head("flashhead", tp_size=size, model=model, index_dir=tied_index)
        for size in (1, 2, 3)
    ]
    states = torch.cat([state, 2 * state])
    found = evaluate_sampling(
        emulated,
        heads["dense_local_max"],
        states,
        temperature=1.0,
        num_draws=4000,
        progress=False,
    )
    assert found.equal_tp_sizes == [1, 2, 3]
    assert found.num_draws == 4000
    assert found.dense_p_value > 1e-3
    assert found.dense_pair_total_variation > found.dense_total_variation
    assert 0 < found.pooled_exact_total_variation <= found.exact_total_variation + 1e-12


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -0.5}, "temperature -0.5 must be finite"),
        ({"temperature": float("nan")}, "temperature nan must be finite"),
        ({"top_k": -1}, "top_k -1 is below 0"),
        ({"top_p": 0.0}, "top_p 0.0 must lie above 0"),
        ({"top_p": 1.5}, "top_p 1.5 must lie"),
        ({"seed": -1}, "seed -1 must lie"),
    ],
)
def test_parameters_that_mean_nothing_are_refused(values: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SamplingParameters(**values)


def test_arguments_that_do_not_fit_are_refused(heads: dict[str, Head], state: torch.Tensor) -> None:
    head, one = heads["flashhead"], torch.tensor([1])
    warm = SamplingParameters(temperature=1.0)
    with pytest.raises(UserError, match="positions of shape"):
        choose_tokens(head, state, torch.arange(2), one, warm)
    with pytest.raises(UserError, match="sequences must lie between 0"):
        choose_tokens(head, state, one, torch.tensor([2**32]), warm)
    with pytest.raises(UserError, match=r"top_k 900 is more than the \d+ tokens"):
        choose_tokens(head, state, one, one, SamplingParameters(temperature=1.0, top_k=900))
    with pytest.raises(UserError, match="token ids must lie between 0 and 1012"):
        token_log_probs(head, state, torch.tensor([1013]))
    with pytest.raises(UserError, match="temperature must be finite and above 0"):
        token_log_probs(head, state, one, temperature=0.0)
    empty = torch.empty(0, dtype=torch.int64)
    assert choose_tokens(head, state[:0], empty, empty, warm).shape == (0,)
    assert token_log_probs(head, state[:0], empty).shape == (0,)
