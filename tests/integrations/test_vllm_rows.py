"""Rows of logits for vLLM's sampler: exact where scored, of the right mass elsewhere, and the same
at every tp_size.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flashhead_dist.heads.distribution import closed_form
from flashhead_dist.heads.flashhead import FlashHead, FlashHeadAuto
from flashhead_dist.index import load_shard
from flashhead_dist.index.shard import read_token_ids
from flashhead_dist.integrations.vllm import rows as rows_module
from flashhead_dist.integrations.vllm.head import Finish, RowsHead
from flashhead_dist.integrations.vllm.needs import Rest, RowNeed
from flashhead_dist.integrations.vllm.rows import VocabularyMap
from flashhead_dist.models import OutputContract, open_model
from flashhead_dist.parallel import TensorParallel, split_tensor_parallel

KINDS = {
    "best": RowNeed(Rest.NOTHING, best_only=True),
    "candidates": RowNeed(Rest.NOTHING),
    "even": RowNeed(Rest.EVEN),
    "drawn": RowNeed(Rest.CLUSTERS),
    "cold": RowNeed(Rest.CLUSTERS, temperature=0.5),
}
EXACT = Finish(torch.float32)


@pytest.fixture(autouse=True)
def few_heavy_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a real index, most unprobed clusters are not among those sent one by one."""
    monkeypatch.setattr(rows_module, "_HEAVY", 2)


@pytest.fixture(scope="module")
def states() -> Tensor:
    draw = torch.Generator().manual_seed(5)
    return (0.3 * torch.randn(6, 64, generator=draw)).to(torch.bfloat16)


def rows_head(index: Path, tp: TensorParallel, finish: Finish = EXACT) -> RowsHead:
    loaded = load_shard(index, tp_rank=tp.tp_rank, tp_size=tp.tp_size)
    manifest = loaded.manifest
    head = FlashHeadAuto(tp, loaded, num_probes=manifest.num_groups * 2, alpha=manifest.alpha)
    token_ids, _ = read_token_ids(index, manifest)
    return RowsHead(head, finish, VocabularyMap.of(token_ids, manifest.vocab_size))


@pytest.fixture(scope="module")
def single(tied_index: Path) -> RowsHead:
    return rows_head(tied_index, TensorParallel.single())


@pytest.fixture(scope="module")
def true_logits(tied_model: Path, states: Tensor) -> Tensor:
    weight = open_model(str(tied_model)).read_rows(0, open_model(str(tied_model)).vocab_size)
    return states.float() @ weight.float().T


def candidates(head: RowsHead, states: Tensor) -> Tensor:
    """bool `[B, V]`: which tokens a draw scores."""
    form = closed_form(_plain(head), states)
    found = torch.zeros(len(states), head.vocab_size + 1, dtype=torch.bool)
    ids = form.token_ids.long()
    found.scatter_(1, torch.where(ids < 0, head.vocab_size, ids), True)
    return found[:, :-1]


def _plain(head: RowsHead) -> FlashHead:
    auto = head.head
    return FlashHead(auto.tp, auto.index, num_probes=auto.num_probes, alpha=auto.alpha)


def _all_kinds(head: RowsHead, states: Tensor) -> dict[str, Tensor]:
    found = {name: head.rows(states, [need] * len(states)) for name, need in KINDS.items()}
    mixed = [KINDS[name] for name in (*KINDS, "best")]
    return {**found, "mixed": head.rows(states, mixed), "dense": head.dense(states)}


def _rows_on_ranks(rank: int, world_size: int, index: Path, states: Tensor) -> Any:
    rows_module._HEAVY = 2
    tp = split_tensor_parallel([world_size])[world_size]
    assert tp is not None
    return _all_kinds(rows_head(index, tp), states)


def test_every_kind_of_row_is_the_same_on_three_ranks(
    single: RowsHead,
    tied_index: Path,
    states: Tensor,
    run_ranks: Callable[..., list[Any]],
) -> None:
    """Fails where groups are not brought back into order, or the padding of uneven ranks stays."""
    expected = _all_kinds(single, states)
    for found in run_ranks(_rows_on_ranks, 3, tied_index, states):
        for name, rows in expected.items():
            if name == "dense":  # a library product: another shape may add in another order
                torch.testing.assert_close(found[name], rows)
            else:
                assert torch.equal(found[name], rows), name


def test_mixed_rows_are_those_of_each_kind(single: RowsHead, states: Tensor) -> None:
    found = _all_kinds(single, states)
    for row, name in enumerate((*KINDS, "best")):
        assert torch.equal(found["mixed"][row], found[name][row]), name


def test_dense_rows_are_in_the_order_of_token_ids(
    single: RowsHead, states: Tensor, true_logits: Tensor
) -> None:
    torch.testing.assert_close(single.dense(states.float()), true_logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["even", "drawn"])
def test_scored_tokens_have_their_logits_and_the_row_its_normaliser(
    kind: str, single: RowsHead, states: Tensor, true_logits: Tensor
) -> None:
    """Fails where the heavy clusters' mass, or the rest's, is left out or counted twice."""
    rows = single.rows(states, [KINDS[kind]] * len(states))
    scored = candidates(single, states)
    assert not scored.all()
    torch.testing.assert_close(rows[scored], true_logits[scored], rtol=1e-4, atol=1e-4)
    log_z = closed_form(_plain(single), states).log_normalizer()
    torch.testing.assert_close(rows.logsumexp(1), log_z.float(), rtol=0, atol=2e-3)


def test_a_drawn_row_is_right_at_its_own_temperature(single: RowsHead, states: Tensor) -> None:
    """Fails where the estimates are those of temperature 1."""
    rows = single.rows(states, [KINDS["cold"]] * len(states))
    log_z = closed_form(_plain(single), states, temperature=0.5).log_normalizer()
    torch.testing.assert_close((rows / 0.5).logsumexp(1), log_z.float(), rtol=0, atol=2e-3)


def test_drawn_rows_tell_heavy_clusters_from_light_ones(single: RowsHead, states: Tensor) -> None:
    """Fails where all unprobed tokens share one level."""
    flat = closed_form(_plain(single), states).unnormalized(flat=True)
    rows = single.rows(states, [KINDS["drawn"]] * len(states))
    even = single.rows(states, [KINDS["even"]] * len(states))

    def distance(some: Tensor) -> float:
        return float((some.softmax(1) - flat.softmax(1)).abs().sum(1).mean())

    assert distance(rows) < 0.7 * distance(even)


@pytest.mark.parametrize("kind", ["best", "candidates", "even"])
def test_greedy_rows_have_the_best_candidate_first(
    kind: str, single: RowsHead, states: Tensor, true_logits: Tensor
) -> None:
    """Fails where an estimate stands above what was scored."""
    rows = single.rows(states, [KINDS[kind]] * len(states))
    scored = candidates(single, states)
    best = true_logits.masked_fill(~scored, -torch.inf)
    assert torch.equal(rows.argmax(1), best.argmax(1))


def test_only_candidates_are_finite_where_no_probability_is_asked_for(
    single: RowsHead, states: Tensor
) -> None:
    rows = single.rows(states, [KINDS["candidates"]] * len(states))
    scored = single.num_scored([KINDS["candidates"]])
    assert (rows.isfinite().sum(1) <= scored).all()
    assert (rows.isfinite().sum(1) > scored // 2).all()


class Coarse(Finish):
    """Rounds so that the best logits are often equal, as bfloat16 does with great ones."""

    def __call__(self, logits: Tensor) -> Tensor:
        return (super().__call__(logits) * 2).round() / 2


def test_logits_equal_once_rounded_go_to_the_smallest_id(
    single: RowsHead, tied_index: Path
) -> None:
    """As in vLLM, whose dense logits are rounded; fails where only the best is fetched."""
    draw = torch.Generator().manual_seed(6)
    states = torch.randn(200, 64, generator=draw)
    coarse = rows_head(tied_index, TensorParallel.single(), Coarse(torch.float32))
    full = coarse.rows(states, [KINDS["candidates"]] * 200)
    few = (full == full.amax(1, keepdim=True)).sum(1) <= 4
    best = coarse.rows(states, [KINDS["best"]] * 200)
    assert torch.equal(best.argmax(1)[few], full.argmax(1)[few])
    exact = single.rows(states, [KINDS["best"]] * 200)
    assert (best.argmax(1) != exact.argmax(1))[few].any()


def test_soft_capped_and_scaled_logits_are_vllms_own_steps(
    tied_index: Path, states: Tensor, true_logits: Tensor
) -> None:
    finish = Finish(torch.float32, softcap=3.0, scale=0.5)
    head = rows_head(tied_index, TensorParallel.single(), finish)
    expected = torch.tanh(true_logits / 3.0) * 3.0 * 0.5
    torch.testing.assert_close(head.dense(states.float()), expected, rtol=1e-4, atol=1e-4)
    rows = head.rows(states, [KINDS["drawn"]] * len(states))
    scored = candidates(head, states)
    torch.testing.assert_close(rows[scored], expected[scored], rtol=1e-4, atol=1e-4)
    # log P is proportional to exp(scale * capped): the closed form at temperature 1 / scale.
    form = closed_form(_plain(head), states, temperature=2.0, contract=OutputContract(softcap=3.0))
    torch.testing.assert_close(rows.logsumexp(1), form.log_normalizer().float(), atol=2e-3, rtol=0)


def test_a_state_with_nan_gives_a_row_and_no_error(single: RowsHead, states: Tensor) -> None:
    """One request's overflow must not end the server; fails where a missing id is scattered."""
    broken = states.clone()
    broken[0] = torch.nan
    for need in KINDS.values():
        rows = single.rows(broken, [need] * len(broken))
        assert rows.shape == (len(broken), single.vocab_size)
        good = single.rows(states, [need] * len(states))
        assert torch.equal(rows[1:], good[1:])


def test_past_the_crossover_only_rows_that_a_scan_serves_stay(single: RowsHead) -> None:
    single.head.changes_at = (3,)
    try:
        assert single.serves([KINDS["drawn"]] * 2)
        assert single.serves([KINDS["best"]] * 3)
        assert not single.serves([KINDS["best"], KINDS["drawn"], KINDS["best"]])
    finally:
        single.head.changes_at = ()
