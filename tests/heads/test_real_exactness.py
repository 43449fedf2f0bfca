"""The two claims on the default model, its default index and every test state.

Sharding exactness: real ranks give the ids of one rank. Fidelity: the dense head's token is found.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flashhead_dist.evaluate.fidelity import evaluate_fidelity
from flashhead_dist.evaluate.truth import dense_truth
from flashhead_dist.heads.base import Head
from flashhead_dist.heads.registry import HeadBuilder, build_head
from flashhead_dist.index import ensure_index
from flashhead_dist.models import ModelSource, open_model
from flashhead_dist.parallel import TensorParallel, split_tensor_parallel
from flashhead_dist.states import HiddenStates, collect_hidden_states

pytestmark = [pytest.mark.real, pytest.mark.timeout(5400)]

HEADS = ("flashhead", "flashhead_global")
TP_SIZES = (2, 3, 5, 8)
BATCH_SIZE = 64


@pytest.fixture(scope="module")
def model() -> ModelSource:
    return open_model()


@pytest.fixture(scope="module")
def index(model: ModelSource) -> Path:
    return ensure_index(model)


@pytest.fixture(scope="module")
def states(model: ModelSource) -> HiddenStates:
    return collect_hidden_states(model)[1]


def _greedy(head: Head, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and logits `[N, 1]` of every state."""
    outputs = [head.forward(batch) for batch in states.split(BATCH_SIZE)]
    return (
        torch.cat([output.token_ids for output in outputs]),
        torch.cat([output.logits for output in outputs]),
    )


def _rank_greedy(
    rank: int, world_size: int, index: Path, states: torch.Tensor, name: str
) -> dict[tuple[str, int], tuple[torch.Tensor, torch.Tensor]]:
    model = open_model()
    found = {}
    for tp_size, tp in split_tensor_parallel(TP_SIZES).items():
        if tp is None:
            continue
        builder = HeadBuilder(tp=tp, model=model, index_dir=index)
        found[(name, tp_size)] = _greedy(builder.build(name), states)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", HEADS)
def test_real_ranks_give_the_ids_and_logits_of_one_rank_for_every_state(
    run_ranks: Callable[..., list[Any]],
    model: ModelSource,
    index: Path,
    states: HiddenStates,
    name: str,
) -> None:
    ranks = run_ranks(_rank_greedy, max(TP_SIZES), index, states.states, name, timeout_s=5000)
    alone = build_head(name, tp=TensorParallel.single(), model=model, index_dir=index)
    ids, logits = _greedy(alone, states.states)
    for tp_size in TP_SIZES:
        for rank in range(tp_size):
            sharded_ids, sharded_logits = ranks[rank][(name, tp_size)]
            assert torch.equal(sharded_ids, ids), (name, tp_size, rank)
            assert torch.equal(sharded_logits, logits), (name, tp_size, rank)


def test_the_default_configuration_finds_the_dense_token(
    model: ModelSource, index: Path, states: HiddenStates
) -> None:
    head = build_head("flashhead", tp=TensorParallel.single(), model=model, index_dir=index)
    truth = dense_truth(model, states.states)
    found = evaluate_fidelity(head, states, truth)
    assert found.bytes_share <= 0.16
    assert found.top1_agreement >= 0.995
    assert found.top1_agreement_worst_source >= 0.990, found.worst_source
