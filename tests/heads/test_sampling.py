"""Draws of every head that samples: the same at each tp_size, and from the distribution it states.

States are flat, and few clusters are probed, so that unprobed clusters win often.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flashhead_dist.errors import UserError
from flashhead_dist.heads.base import Head
from flashhead_dist.heads.distribution import closed_form
from flashhead_dist.heads.registry import HEADS, HeadBuilder, emulate_head, sampling_heads
from flashhead_dist.heads.sampling import SamplingParameters, choose_tokens, token_log_probs
from flashhead_dist.models import ModelSource, open_model
from flashhead_dist.parallel import TensorParallel, split_tensor_parallel

TP_SIZES = (1, 2, 3, 5)
NUM_STATES = 40
KINDS = {
    "greedy": SamplingParameters(),
    "temperature": SamplingParameters(temperature=1.0, seed=3),
    "cold": SamplingParameters(temperature=0.4, seed=2**63 + 5),
    "top_k": SamplingParameters(temperature=1.0, top_k=7),
    "top_p": SamplingParameters(temperature=0.3, top_p=0.5),
    "wide top_p": SamplingParameters(temperature=1.0, top_p=0.97),
    "both": SamplingParameters(temperature=1.0, top_k=30, top_p=0.8),
}


@pytest.fixture(scope="module")
def model(tied_model: Path) -> ModelSource:
    return open_model(str(tied_model))


@pytest.fixture(scope="module")
def states() -> torch.Tensor:
    draw = torch.Generator().manual_seed(11)
    return (0.2 * torch.randn(NUM_STATES, 64, generator=draw)).to(torch.bfloat16)


@pytest.fixture(scope="module")
def heads(model: ModelSource, tied_index: Path) -> dict[str, Head]:
    builder = HeadBuilder(tp=TensorParallel.single(), model=model, index_dir=tied_index)
    return {name: builder.build(name) for name in HEADS}


def places(count: int = NUM_STATES) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(count) * 7, torch.arange(count) % 3


def _choose_on_ranks(
    rank: int, world_size: int, model_path: Path, index: Path, states: torch.Tensor
) -> dict[Any, Any]:
    result: dict[Any, Any] = {}
    model = open_model(str(model_path))
    positions, sequences = places()
    for tp_size, tp in split_tensor_parallel(TP_SIZES).items():
        if tp is None:
            continue
        builder = HeadBuilder(tp=tp, model=model, index_dir=index)
        for name in sampling_heads():
            head = builder.build(name)
            for kind, parameters in KINDS.items():
                tp.reset()
                chosen = choose_tokens(head, states, positions, sequences, parameters)
                result[name, tp_size, kind] = chosen
                result[name, tp_size, kind, "wire"] = (tp.payload_bytes, tp.num_collectives)
            targets = torch.arange(NUM_STATES) * 25
            result[name, tp_size, "log_probs"] = token_log_probs(head, states, targets)
    return result


@pytest.fixture(scope="module")
def ranks(
    run_ranks: Callable[..., list[Any]], tied_model: Path, tied_index: Path, states: torch.Tensor
) -> list[dict[Any, Any]]:
    return run_ranks(_choose_on_ranks, 5, tied_model, tied_index, states)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", sampling_heads())
def test_draws_are_those_of_one_rank(ranks: list[dict[Any, Any]], name: str, kind: str) -> None:
    alone = ranks[0][name, 1, kind]
    assert kind == "greedy" or len(set(alone.tolist())) > 10
    for tp_size in TP_SIZES:
        for rank in range(tp_size):
            assert torch.equal(ranks[rank][name, tp_size, kind], alone)


def test_a_draw_is_one_maximum_of_eight_bytes(ranks: list[dict[Any, Any]]) -> None:
    for name in ("flashhead", "dense_local_max"):
        for tp_size in TP_SIZES[1:]:
            assert ranks[0][name, tp_size, "temperature", "wire"] == (8 * NUM_STATES, 1)
            assert ranks[0][name, tp_size, "top_k", "wire"] == (tp_size * 56 * NUM_STATES, 1)
    assert ranks[0]["flashhead_replicated", 5, "wide top_p", "wire"] == (0, 0)


@pytest.mark.parametrize("name", sampling_heads())
def test_log_probs_are_those_of_one_rank(ranks: list[dict[Any, Any]], name: str) -> None:
    for tp_size in TP_SIZES:
        found = ranks[0][name, tp_size, "log_probs"]
        torch.testing.assert_close(found, ranks[0][name, 1, "log_probs"], rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", sampling_heads())
@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_log_probs_sum_to_one(
    heads: dict[str, Head], states: torch.Tensor, name: str, temperature: float
) -> None:
    every = torch.arange(1013)
    for state in states[:3]:
        rows = state.expand(1013, -1)
        log_probs = token_log_probs(heads[name], rows, every, temperature=temperature)
        assert abs(float(log_probs.double().exp().sum()) - 1) < 1e-5
        form = closed_form(heads[name], state[None], temperature=temperature)
        full = form.unnormalized()[0].double() - form.log_normalizer()
        torch.testing.assert_close(log_probs.double(), full, rtol=0, atol=1e-5)


def test_emulated_ranks_draw_what_real_ranks_draw(
    ranks: list[dict[Any, Any]], model: ModelSource, tied_index: Path, states: torch.Tensor
) -> None:
    head = emulate_head("flashhead", tp_size=3, model=model, index_dir=tied_index)
    for kind, parameters in KINDS.items():
        found = choose_tokens(head, states, *places(), parameters)
        assert torch.equal(found, ranks[0]["flashhead", 3, kind])


@pytest.mark.parametrize("name", [n for n in HEADS if n not in sampling_heads()])
def test_other_heads_name_those_that_sample(
    heads: dict[str, Head], states: torch.Tensor, name: str
) -> None:
    greedy = choose_tokens(heads[name], states, *places(), SamplingParameters())
    assert torch.equal(greedy, heads[name](states).token_ids[:, 0])
    with pytest.raises(UserError, match=r"choose one of .*flashhead"):
        choose_tokens(heads[name], states, *places(), KINDS["temperature"])
