"""Sampling on the default model: normalised, near the dense head, and the likely bugs seen."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flashhead_dist.evaluate.sampling import evaluate_sampling, top_chi_square
from flashhead_dist.heads.base import Head
from flashhead_dist.heads.distribution import ClosedForm, closed_form
from flashhead_dist.heads.registry import HeadBuilder, emulate_head
from flashhead_dist.heads.sampling import token_log_probs
from flashhead_dist.index import ensure_index
from flashhead_dist.models import ModelSource, open_model
from flashhead_dist.parallel import TensorParallel
from flashhead_dist.states import collect_hidden_states
from flashhead_kernels.keys import unpack_keys
from flashhead_kernels.noise import GumbelNoise

pytestmark = [pytest.mark.real, pytest.mark.timeout(1800)]

DRAWS = 20_000


@pytest.fixture(scope="module")
def model() -> ModelSource:
    return open_model()


@pytest.fixture(scope="module")
def heads(model: ModelSource) -> dict[str, Head]:
    index = ensure_index(model)
    builder = HeadBuilder(tp=TensorParallel.single(), model=model, index_dir=index)
    return {name: builder.build(name) for name in ("flashhead", "dense_local_max")}


@pytest.fixture(scope="module")
def states(model: ModelSource) -> torch.Tensor:
    return collect_hidden_states(model)[1].states[::2500].contiguous()


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_every_token_has_its_share_of_one(
    heads: dict[str, Head], states: torch.Tensor, temperature: float
) -> None:
    for state in states[:4]:
        form = closed_form(heads["flashhead"], state[None], temperature=temperature)
        every = form.unnormalized()[0].double() - form.log_normalizer()
        assert abs(float(every.exp().sum()) - 1) < 1e-4
        tokens = torch.arange(0, heads["flashhead"].vocab_size, 2621)
        rows = state.expand(len(tokens), -1)
        found = token_log_probs(heads["flashhead"], rows, tokens, temperature=temperature)
        torch.testing.assert_close(found.double(), every[tokens], rtol=0, atol=1e-4)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_draws_are_as_near_as_dense_draws(
    model: ModelSource, heads: dict[str, Head], states: torch.Tensor, temperature: float
) -> None:
    emulated = [
        emulate_head("flashhead", tp_size=size, model=model, index_dir=ensure_index(model))
        for size in (1, 2, 3)
    ]
    found = evaluate_sampling(
        emulated,
        heads["dense_local_max"],
        states,
        temperature=temperature,
        num_draws=DRAWS,
        progress=False,
    )
    assert found.equal_tp_sizes == [1, 2, 3]
    assert found.total_variation < 1.1 * found.dense_total_variation
    assert found.p_value > 1e-3
    assert found.same_as_dense > 0.95


def _drawn(form: ClosedForm, each: int = 1) -> torch.Tensor:
    places = torch.arange(DRAWS) // each
    rows = torch.zeros(DRAWS, dtype=torch.int64)
    tokens = unpack_keys(form.draw(GumbelNoise(3, places), rows))[1]
    return torch.bincount(tokens, minlength=262_144).double()


def test_the_likely_bugs_are_seen(heads: dict[str, Head], states: torch.Tensor) -> None:
    """On the state whose unprobed clusters weigh most, at a temperature that spreads it."""
    form = closed_form(heads["flashhead"], states, temperature=1.3)
    unprobed = form.group_log_mass.double().logsumexp(1) - form.log_normalizer()
    worst = int(unprobed.argmax())
    form = closed_form(heads["flashhead"], states[worst : worst + 1], temperature=1.3)
    expected = form.unnormalized()[0].double().softmax(0)
    assert top_chi_square(_drawn(form), expected)[1] > 1e-3
    assert top_chi_square(_drawn(form, each=4), expected)[1] < 1e-6
    empty = torch.full_like(form.log_mass, float("-inf"))
    dropped = replace(form, log_mass=empty, group_log_mass=empty.amax(2))
    assert top_chi_square(_drawn(dropped), expected)[1] < 1e-6
