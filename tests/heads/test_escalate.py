"""flashhead_escalate: which rows look again, what they then get, and that every tp_size agrees.

Mutated to see each fail: a rank that judges by its own unprobed cluster (ranks then ask for
different exchanges), a margin over the batch in place of the row, the second round's answers put
into the first rows, `<=` for `<` where all is probed, the second round with the first one's probes.
"""

from __future__ import annotations

from math import inf, nan
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flashhead_dist.errors import UserError
from flashhead_dist.heads.base import HeadOutput, HeadShape, Want
from flashhead_dist.heads.flashhead_escalate import Escalation, FlashHeadEscalate
from flashhead_dist.heads.registry import HEADS, build_head, emulate_head
from flashhead_dist.index import load_manifest
from flashhead_dist.index.calibrate import SHARES, USUAL_SHARE, margins
from flashhead_dist.models import ModelSource, open_model
from flashhead_dist.parallel import TensorParallel
from flashhead_kernels import reference
from flashhead_kernels.shard import Query

WANTS = (Want(), Want(k=3), Want(logsumexp=True), Want(k=2, logsumexp=True, candidate_mass=True))


@pytest.fixture(scope="module")
def model(tied_model: Path) -> ModelSource:
    return open_model(str(tied_model))


@pytest.fixture(scope="module")
def states() -> Tensor:
    draw = torch.Generator().manual_seed(11)
    return (0.4 * torch.randn(48, 64, generator=draw)).to(torch.bfloat16)


def escalating(model: ModelSource, index: Path, escalation: Escalation) -> FlashHeadEscalate:
    head = build_head(
        "flashhead_escalate",
        tp=TensorParallel.single(),
        model=model,
        index_dir=index,
        escalation=escalation,
    )
    assert isinstance(head, FlashHeadEscalate)
    return head


def other(model: ModelSource, index: Path, name: str, probes: int | None = None) -> Any:
    single = TensorParallel.single()
    return build_head(name, tp=single, model=model, index_dir=index, num_probes=probes)


def true_margins(head: FlashHeadEscalate, states: Tensor) -> Tensor:
    """float64 `[B]`, from the rule as it is written: every group's scores sorted."""
    shard = head.shard
    scores = reference.score_centroids(states, shard, head.alpha).double()
    order = scores.sort(dim=2, descending=True)
    per_group = head.num_probes // head.num_groups
    left = order.values[:, :, per_group:].flatten(1).amax(1)
    logits = torch.einsum("bd,gmsd->bgms", states.double(), shard.rows.double())
    logits = logits.masked_fill(shard.token_ids < 0, -inf).amax(3)
    probed = logits.gather(2, order.indices[:, :, :per_group]).flatten(1).amax(1)
    pinned = torch.einsum("bd,gnd->bgn", states.double(), shard.pinned_rows.double())
    pinned = pinned.masked_fill(shard.pinned_token_ids < 0, -inf).flatten(1).amax(1)
    return torch.maximum(probed, pinned) - left


@pytest.fixture(scope="module")
def threshold(model: ModelSource, tied_index: Path, states: Tensor) -> float:
    """Between two margins, so that a third of the rows escalates whatever the rounding."""
    found = true_margins(escalating(model, tied_index, Escalation()), states).sort().values
    assert float(found[16] - found[15]) > 1e-3
    return float(found[15] + found[16]) / 2


def same(left: HeadOutput, right: HeadOutput, rows: Tensor) -> bool:
    return torch.equal(left.token_ids[rows], right.token_ids[rows]) and torch.equal(
        left.logits[rows], right.logits[rows]
    )


@pytest.mark.parametrize("probes", [None, 64])
@pytest.mark.parametrize("want", WANTS)
def test_rows_of_small_margin_look_again_and_no_other(
    model: ModelSource,
    tied_index: Path,
    states: Tensor,
    threshold: float,
    want: Want,
    probes: int | None,
) -> None:
    head = escalating(model, tied_index, Escalation(margin=threshold, num_probes=probes))
    again = true_margins(head, states) < threshold
    found = head.serve(states, want)
    first = other(model, tied_index, "flashhead").serve(states, want)
    name = "dense_local_max" if probes is None else "flashhead"
    dense_want = Want(want.k, want.logsumexp or want.candidate_mass)
    second = other(model, tied_index, name, probes).serve(
        states, dense_want if probes is None else want
    )
    assert same(found, first, ~again)
    assert same(found, second, again)
    assert not torch.equal(first.token_ids[again], second.token_ids[again]), "nothing was missed"
    assert (head.num_rows, head.num_escalated) == (48, 16)
    if want.logsumexp:
        assert found.logsumexp is not None
        assert torch.equal(found.logsumexp[~again], first.logsumexp[~again])
        torch.testing.assert_close(found.logsumexp[again], second.logsumexp[again])
    if want.candidate_mass:
        assert found.candidate_logsumexp is not None
        mass = second.logsumexp if probes is None else second.candidate_logsumexp
        torch.testing.assert_close(found.candidate_logsumexp[again], mass[again])


@pytest.mark.parametrize("probes", [None, 64])
@pytest.mark.parametrize("tp_size", [2, 3, 5, 8])
def test_every_tp_size_judges_and_answers_alike(
    model: ModelSource,
    tied_index: Path,
    states: Tensor,
    threshold: float,
    tp_size: int,
    probes: int | None,
) -> None:
    escalation = Escalation(margin=threshold, num_probes=probes)
    alone = escalating(model, tied_index, escalation)
    split = emulate_head(
        "flashhead_escalate",
        tp_size=tp_size,
        model=model,
        index_dir=tied_index,
        escalation=escalation,
    )
    for want in WANTS:
        found, expected = split.serve(states, want), alone.serve(states, want)
        assert same(found, expected, torch.arange(48))
        if want.logsumexp:
            torch.testing.assert_close(found.logsumexp, expected.logsumexp, rtol=1e-6, atol=0)
    for rank in split.ranks:
        assert isinstance(rank, FlashHeadEscalate)
        assert rank.num_escalated == 16 * len(WANTS)


def test_a_row_is_answered_alike_alone_and_in_any_batch(
    model: ModelSource, tied_index: Path, states: Tensor, threshold: float
) -> None:
    head = escalating(model, tied_index, Escalation(margin=threshold))
    together = head.forward(states, k=2)
    for start, stop in ((0, 1), (1, 2), (3, 20), (20, 48)):
        part = head.forward(states[start:stop], k=2)
        assert torch.equal(part.token_ids, together.token_ids[start:stop])
        assert torch.equal(part.logits, together.logits[start:stop])


def test_the_ends_are_flashhead_and_the_dense_head(
    model: ModelSource, tied_index: Path, states: Tensor
) -> None:
    never = escalating(model, tied_index, Escalation(margin=-inf))
    always = escalating(model, tied_index, Escalation(margin=inf))
    every = torch.arange(48)
    assert same(never.forward(states), other(model, tied_index, "flashhead").forward(states), every)
    dense = other(model, tied_index, "dense_local_max").forward(states)
    assert same(always.forward(states), dense, every)
    assert (never.num_escalated, always.num_escalated) == (0, 48)
    assert never.forward(states[:0]).token_ids.shape == (0, 1)


def test_where_everything_is_probed_there_is_nothing_to_look_at_again(
    model: ModelSource, tied_index: Path, states: Tensor
) -> None:
    head = build_head(
        "flashhead_escalate",
        tp=TensorParallel.single(),
        model=model,
        index_dir=tied_index,
        num_probes=256,
        escalation=Escalation(margin=inf),
    )
    head.forward(states)
    assert isinstance(head, FlashHeadEscalate)
    assert head.num_escalated == 0


def test_bytes_are_of_the_rows_that_escalated(
    model: ModelSource, tied_index: Path, states: Tensor, threshold: float
) -> None:
    plain = other(model, tied_index, "flashhead")
    head = escalating(model, tied_index, Escalation(margin=threshold, expected_share=0.25))
    every = head.shard.rows.nbytes + head.shard.token_ids.nbytes
    every += head.shard.pinned_rows.nbytes + head.shard.pinned_token_ids.nbytes
    assert head.read_bytes_per_step(1) == plain.read_bytes_per_step(1) + round(0.25 * every)
    head.forward(states)
    assert head.escalated_share == 1 / 3
    assert head.read_bytes_per_step(1) == plain.read_bytes_per_step(1) + round(every / 3)
    two = plain.read_bytes_per_step(2) + round((1 - 4 / 9) * every)
    assert head.read_bytes_per_step(2) == two, "rows of a batch share one scan"


@pytest.mark.parametrize("tp_size", [1, 3])
@pytest.mark.parametrize("probes", [None, 64])
def test_the_cost_model_counts_the_second_round(
    model: ModelSource, tied_index: Path, tp_size: int, probes: int | None
) -> None:
    head = build_head(
        "flashhead_escalate",
        tp=TensorParallel(tp_rank=0, tp_size=tp_size),
        model=model,
        index_dir=tied_index,
        escalation=Escalation(num_probes=probes, expected_share=0.1),
    )
    known = vars(HeadShape.of_index(load_manifest(tied_index)))
    shape = HeadShape(**known | {"escalated_share": 0.1, "escalated_probes": probes or 0})
    for batch in (1, 4, 300):
        work = HEADS["flashhead_escalate"].work(shape, tp_size, batch)
        assert round(work.read_bytes) == head.read_bytes_per_step(batch), batch
    sent = HEADS["flashhead_escalate"].work(shape, tp_size, 4).exchanges
    assert [exchange.operand_bytes for exchange in sent] == [64, 8]
    assert sent[1].times == pytest.approx(1 - 0.9**4)


def test_an_index_keeps_the_margins_of_its_calibration_states(
    model: ModelSource, build_one: Any, index_states: Any
) -> None:
    manifest = load_manifest(build_one("kept"))
    by_share = manifest.margin_by_share
    assert tuple(by_share) == SHARES
    assert list(by_share.values()) == sorted(by_share.values())
    head = escalating(model, build_one("again"), None)  # type: ignore[arg-type]
    assert head.escalation.margin == by_share[USUAL_SHARE]
    shard, calibration = head.shard, index_states[0]
    found = margins(shard, calibration.states, Query(2, manifest.alpha))
    for share in (0.1, 0.2, 0.5):
        below = float((found < by_share[share]).double().mean())
        assert below == pytest.approx(share, abs=0.02), "drawn evenly from two sources"
    head.forward(calibration.states)
    assert head.escalated_share == pytest.approx(USUAL_SHARE, abs=0.02)


def test_an_index_that_was_not_calibrated_takes_margin_zero(
    model: ModelSource, tied_index: Path
) -> None:
    head = escalating(model, tied_index, None)  # type: ignore[arg-type]
    assert head.escalation == Escalation(margin=0.0, num_probes=None, expected_share=USUAL_SHARE)


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"margin": nan}, "the margin of escalation is not a number"),
        ({"num_probes": 0}, "escalation to 0 probes looks at nothing"),
        ({"num_probes": 16}, "must lie above the head's own 16"),
        ({"num_probes": 257}, "not above the index's 256 clusters"),
        ({"expected_share": 1.5}, "the expected share of escalated rows is 1.5"),
    ],
)
def test_what_cannot_be_is_refused(
    model: ModelSource, tied_index: Path, given: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(UserError, match=complaint):
        escalating(model, tied_index, Escalation(**given))
