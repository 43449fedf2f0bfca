"""Every head on 1, 2, 3 and 5 real gloo ranks: the same answer on each, and at each size.

The model's rows come in pairs of equal rows far apart in the vocabulary, and the first states point
at such rows: their best two logits are equal, so a rule for ties is at work in every exchange.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flashhead_dist.evaluate.fidelity import evaluate_fidelity
from flashhead_dist.evaluate.truth import dense_truth
from flashhead_dist.heads.base import HeadOutput
from flashhead_dist.heads.registry import HEADS, HeadBuilder, build_head, emulate_head
from flashhead_dist.models import open_model
from flashhead_dist.parallel import TensorParallel, split_tensor_parallel
from flashhead_dist.states import HiddenStates

Run = Callable[..., list[Any]]
Results = list[dict[tuple[Any, ...], Any]]
WORLD_SIZE = 5
TP_SIZES = (1, 2, 3, 5)
EXACT_HEADS = (
    "flashhead",
    "flashhead_escalate",
    "flashhead_global",
    "flashhead_replicated",
    "dense_local_max",
)
NUM_TIES = 40


def tied_states(weights: torch.Tensor) -> HiddenStates:
    """States `[150, D]` bf16: 40 that point at rows with a twin, the others between rows."""
    draw = torch.Generator().manual_seed(5)
    near = weights[torch.randperm(len(weights), generator=draw)[:110]].float()
    noise = torch.randn(near.shape, generator=draw)
    states = torch.cat([weights[:NUM_TIES].float() * 4, near * 3 + noise]).to(torch.bfloat16)
    sources = torch.cat([torch.zeros(NUM_TIES), torch.arange(110) % 2 + 1]).long()
    return HiddenStates(states, sources, ("tied", "odd", "even"), "made for a test")


def _rank_heads(
    rank: int, world_size: int, model_path: Path, index: Path, states: HiddenStates
) -> dict[tuple[Any, ...], Any]:
    result: dict[tuple[Any, ...], Any] = {}
    model = open_model(str(model_path))
    truth = dense_truth(model, states.states, progress=False)
    for tp_size, tp in split_tensor_parallel(TP_SIZES).items():
        if tp is None:
            continue
        for dtype in (torch.bfloat16, torch.float32, torch.float16):
            builder = HeadBuilder(tp=tp, model=model, index_dir=index, dtype=dtype)
            for name in HEADS:
                head = builder.build(name)
                key = (name, tp_size, dtype)
                tp.reset()
                result[(*key, "greedy")] = head.forward(states.states)
                result[(*key, "counted")] = (tp.payload_bytes, tp.num_collectives)
                result[(*key, "stated")] = head.payload_bytes_per_row
                need = head.has_logsumexp
                tp.reset()
                result[(*key, "top5")] = head.forward(states.states, k=5, need_logsumexp=need)
                result[(*key, "counted5")] = (tp.payload_bytes, tp.num_collectives)
                result[(*key, "empty")] = head.forward(states.states[:0], k=2).token_ids.shape
                if dtype is torch.bfloat16:
                    found = evaluate_fidelity(head, states, truth, progress=False)
                    result[(*key, "fidelity")] = found
    return result


@pytest.fixture(scope="module")
def states(tied_model: Path) -> HiddenStates:
    return tied_states(open_model(str(tied_model)).read_rows(0, 200))


@pytest.fixture(scope="module")
def ranks(run_ranks: Run, tied_model: Path, tied_index: Path, states: HiddenStates) -> Results:
    return run_ranks(_rank_heads, WORLD_SIZE, tied_model, tied_index, states, timeout_s=240)


def _same(left: HeadOutput, right: HeadOutput) -> bool:
    return torch.equal(left.token_ids, right.token_ids) and torch.equal(left.logits, right.logits)


DTYPES = (torch.bfloat16, torch.float32, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", EXACT_HEADS)
def test_ids_and_logits_are_those_of_one_rank_bit_for_bit(
    ranks: Results, name: str, dtype: torch.dtype
) -> None:
    for asked in ("greedy", "top5"):
        alone = ranks[0][(name, 1, dtype, asked)]
        for tp_size in TP_SIZES[1:]:
            assert _same(ranks[0][(name, tp_size, dtype, asked)], alone)


@pytest.mark.parametrize("name", EXACT_HEADS)
def test_logsumexp_is_that_of_one_rank_within_float32_rounding(ranks: Results, name: str) -> None:
    alone = ranks[0][(name, 1, torch.bfloat16, "top5")].logsumexp
    for tp_size in TP_SIZES[1:]:
        sharded = ranks[0][(name, tp_size, torch.bfloat16, "top5")].logsumexp
        # Each of P partials is off by half an ulp at most, and so is the result.
        assert float(((sharded - alone).abs() / alone.abs()).max()) <= 4 * 2**-24


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", HEADS)
def test_every_rank_gives_the_same_answer(ranks: Results, name: str, dtype: torch.dtype) -> None:
    for tp_size in TP_SIZES:
        for asked in ("greedy", "top5"):
            first = ranks[0][(name, tp_size, dtype, asked)]
            for rank in range(1, tp_size):
                other = ranks[rank][(name, tp_size, dtype, asked)]
                assert _same(other, first)
                if first.logsumexp is not None:
                    assert torch.equal(other.logsumexp, first.logsumexp)


@pytest.mark.parametrize("name", HEADS)
def test_the_first_of_five_is_the_greedy_token(ranks: Results, name: str) -> None:
    for tp_size in TP_SIZES:
        greedy = ranks[0][(name, tp_size, torch.float32, "greedy")].token_ids[:, 0]
        assert torch.equal(greedy, ranks[0][(name, tp_size, torch.float32, "top5")].token_ids[:, 0])


def test_dense_local_max_is_the_truth_ties_included(
    ranks: Results, tied_model: Path, states: HiddenStates
) -> None:
    truth = dense_truth(open_model(str(tied_model)), states.states, progress=False)
    tied = truth.logits[:NUM_TIES]
    assert bool((tied[:, 0] == tied[:, 1]).all())
    assert bool((truth.token_ids[:NUM_TIES, 0] < truth.token_ids[:NUM_TIES, 1]).all())
    for tp_size in TP_SIZES:
        output = ranks[0][("dense_local_max", tp_size, torch.bfloat16, "top5")]
        assert torch.equal(output.token_ids, truth.token_ids[:, :5])
        assert torch.equal(output.logits, truth.logits[:, :5])
        assert torch.allclose(output.logsumexp, truth.logsumexp, rtol=1e-6)


@pytest.mark.parametrize("name", ["dense_gather", "dense_allreduce"])
@pytest.mark.parametrize("tp_size", TP_SIZES)
def test_the_other_dense_heads_differ_by_their_rounding_only(
    ranks: Results, tied_model: Path, states: HiddenStates, name: str, tp_size: int
) -> None:
    """Relative error of a logit: fp32 sums in another order; bf16 rounds each of P partials."""
    truth = dense_truth(open_model(str(tied_model)), states.states, progress=False)
    tolerances = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
    for dtype, tolerance in tolerances.items():
        output = ranks[0][(name, tp_size, dtype, "greedy")]
        scale = truth.logits[:, 0]
        assert float(((output.logits[:, 0] - scale) / scale).abs().max()) < tolerance
    output = ranks[0][(name, tp_size, torch.float32, "greedy")]
    clear = truth.logits[:, 0] - truth.logits[:, 2] > 1e-3
    assert torch.equal(output.token_ids[clear, 0], truth.token_ids[clear, 0])


def test_argmax_over_ranks_without_packed_keys_would_break_ties_by_rank(
    tied_model: Path, tied_index: Path, states: HiddenStates
) -> None:
    """The likely bug: each rank's best float logit, then the first rank that has the greatest."""
    model = open_model(str(tied_model))
    alone = build_head("flashhead", tp=TensorParallel.single(), model=model, index_dir=tied_index)
    emulated = emulate_head("flashhead", tp_size=3, model=model, index_dir=tied_index)
    best = []
    for rank in emulated.ranks:
        rank.tp = TensorParallel.single()
        best.append(rank.forward(states.states))
    logits = torch.cat([output.logits for output in best], dim=1)
    ids = torch.cat([output.token_ids for output in best], dim=1)
    naive = ids.gather(1, logits.argmax(1, keepdim=True))
    expected = alone.forward(states.states)
    assert torch.equal(logits.amax(1), expected.logits[:, 0])
    assert not torch.equal(naive, expected.token_ids)


PAYLOAD = {
    "flashhead": lambda tp_size, itemsize: 8,
    "flashhead_auto": lambda tp_size, itemsize: 8,
    # A candidate and an unprobed cluster; rows that escalate have a key more, in a second exchange.
    "flashhead_escalate": lambda tp_size, itemsize: 16,
    "faiss_ivf": lambda tp_size, itemsize: 8,
    "dense_local_max": lambda tp_size, itemsize: 8,
    "flashhead_replicated": lambda tp_size, itemsize: 0,
    "dense_allreduce": lambda tp_size, itemsize: 1013 * itemsize,
    "dense_gather": lambda tp_size, itemsize: -(-1013 // tp_size) * tp_size * itemsize,
    # 8 groups of 32 clusters, float32 scores, and the key.
    "flashhead_global": lambda tp_size, itemsize: -(-8 // tp_size) * tp_size * 32 * 4 + 8,
}


@pytest.mark.parametrize("name", HEADS)
def test_greedy_payload_is_what_the_head_states(
    ranks: Results, states: HiddenStates, name: str
) -> None:
    for dtype in DTYPES:
        assert ranks[0][(name, 1, dtype, "counted")] == (0, 0)
        for tp_size in TP_SIZES[1:]:
            expected = PAYLOAD[name](tp_size, dtype.itemsize)
            payload, collectives = ranks[tp_size - 1][(name, tp_size, dtype, "counted")]
            again = payload - expected * len(states)
            assert again == 0 or (name == "flashhead_escalate" and again % 8 == 0)
            assert again < 8 * len(states)
            assert ranks[0][(name, tp_size, dtype, "stated")] == expected
            exchanges = {"flashhead_replicated": 0, "flashhead_global": 2}
            exchanges["flashhead_escalate"] = 1 + (again > 0)
            assert collectives == exchanges.get(name, 1)


def test_five_tokens_and_logsumexp_take_one_gather_of_five_keys_and_a_float(
    ranks: Results, states: HiddenStates
) -> None:
    for tp_size in TP_SIZES[1:]:
        payload, collectives = ranks[0][("flashhead", tp_size, torch.bfloat16, "counted5")]
        assert (payload, collectives) == (tp_size * (5 * 8 + 4) * len(states), 1)


@pytest.mark.parametrize("name", HEADS)
def test_an_empty_batch_gives_an_empty_answer_on_every_rank(ranks: Results, name: str) -> None:
    for rank in range(5):
        assert ranks[rank][(name, 5, torch.bfloat16, "empty")] == (0, 2)


@pytest.mark.parametrize("tp_size", TP_SIZES)
@pytest.mark.parametrize("name", HEADS)
def test_emulated_fidelity_is_that_of_real_ranks(
    ranks: Results,
    tied_model: Path,
    tied_index: Path,
    states: HiddenStates,
    name: str,
    tp_size: int,
) -> None:
    model = open_model(str(tied_model))
    head = emulate_head(name, tp_size=tp_size, model=model, index_dir=tied_index)
    truth = dense_truth(model, states.states, progress=False)
    emulated = evaluate_fidelity(head, states, truth, progress=False)
    assert emulated.emulated
    for rank in range(tp_size):
        real = ranks[rank][(name, tp_size, torch.bfloat16, "fidelity")]
        assert not real.emulated
        assert replace(real, emulated=True) == emulated


def _rank_that_raises(rank: int, world_size: int, model_path: Path, index: Path) -> None:
    tp = split_tensor_parallel([world_size])[world_size]
    assert tp is not None
    model = open_model(str(model_path))
    head = build_head("flashhead", tp=tp, model=model, index_dir=index)
    states = torch.ones(2, model.hidden_size)
    if rank == 1:
        states[1, 3] = float("nan")
    head.forward(states)


def test_a_rank_that_raises_ends_all_with_its_own_message(
    run_ranks: Run, tied_model: Path, tied_index: Path
) -> None:
    start = time.monotonic()
    with pytest.raises(Exception, match="hidden state 1 holds NaN") as caught:
        run_ranks(_rank_that_raises, 3, tied_model, tied_index, timeout_s=60)
    assert type(caught.value).__name__ == "RankFailedError"
    assert time.monotonic() - start < 45
