"""What heads refuse at the door and when they are built, each with the value and the remedy."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from flashhead_dist.errors import UserError
from flashhead_dist.heads.base import Want
from flashhead_dist.heads.registry import HEADS, HeadBuilder, build_head, emulate_head
from flashhead_dist.models import ModelSource, open_model
from flashhead_dist.parallel import TensorParallel

NUM_CLUSTERS = 256


@pytest.fixture(scope="module")
def model(tied_model: Path) -> ModelSource:
    return open_model(str(tied_model))


@pytest.fixture(scope="module")
def builder(model: ModelSource, tied_index: Path) -> HeadBuilder:
    return HeadBuilder(tp=TensorParallel.single(), model=model, index_dir=tied_index)


@pytest.mark.parametrize("name", HEADS)
def test_nan_and_infinity_are_refused_at_the_door_by_row(builder: HeadBuilder, name: str) -> None:
    head = builder.build(name)
    for value, kind in ((float("nan"), "NaN"), (float("inf"), "inf"), (float("-inf"), "inf")):
        bad = torch.ones(4, 64, dtype=torch.bfloat16)
        bad[2, 5] = value
        with pytest.raises(UserError, match=f"hidden state 2 holds {kind}"):
            head.forward(bad)


def test_great_finite_states_are_not_taken_for_infinite(builder: HeadBuilder) -> None:
    """Their float32 sum overflows, which alone proves nothing."""
    head = builder.build("flashhead")
    head.check(torch.full((1, 64), 3e38), Want())


@pytest.mark.parametrize("name", HEADS)
def test_what_does_not_fit_is_named(builder: HeadBuilder, name: str) -> None:
    head = builder.build(name)
    with pytest.raises(UserError, match=r"\(2, 63\).*\[B, 64\]"):
        head.forward(torch.ones(2, 63))
    with pytest.raises(UserError, match="float64"):
        head.forward(torch.ones(2, 64, dtype=torch.float64))
    for k in (0, 1014):
        with pytest.raises(UserError, match=f"between 1 and 1013, got {k}"):
            head.forward(torch.ones(2, 64), k=k)


@pytest.mark.parametrize("name", HEADS)
def test_an_empty_batch_gives_empty_tensors(builder: HeadBuilder, name: str) -> None:
    head = builder.build(name)
    output = head.forward(torch.empty(0, 64), k=3, need_logsumexp=head.has_logsumexp)
    assert output.token_ids.shape == output.logits.shape == (0, 3)
    assert output.logsumexp is None or output.logsumexp.shape == (0,)


def test_bad_choices_are_refused_with_their_value(
    builder: HeadBuilder, model: ModelSource, tied_index: Path
) -> None:
    with pytest.raises(UserError, match=r"'flash'.*dense_gather, .*faiss_ivf"):
        builder.build("flash")
    for count in (0, NUM_CLUSTERS + 1):
        with pytest.raises(UserError, match=f"num_probes {count} .* {NUM_CLUSTERS} clusters"):
            builder.build("flashhead", num_probes=count)
    with pytest.raises(UserError, match="alpha nan"):
        builder.build("flashhead", alpha=float("nan"))
    for name in ("flashhead", "flashhead_global"):
        with pytest.raises(UserError, match="8 probing groups"):
            emulate_head(name, tp_size=9, model=model, index_dir=tied_index)
    for name in ("dense_gather", "dense_local_max"):
        with pytest.raises(UserError, match=r"vocabulary of 1013 .* tp_size 1014"):
            build_head(name, tp=TensorParallel(tp_rank=0, tp_size=1014), model=model)
    with pytest.raises(UserError, match="hidden size of 64"):
        build_head("dense_allreduce", tp=TensorParallel(tp_rank=0, tp_size=65), model=model)
    with pytest.raises(UserError, match="tp_size must be at least 1, got 0"):
        emulate_head("flashhead", tp_size=0, model=model, index_dir=tied_index)
    with pytest.raises(UserError, match="--index"):
        build_head("flashhead", tp=TensorParallel.single(), model=model)


def test_missing_faiss_names_the_extra(
    builder: HeadBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UserError, match=r"\.\[faiss\]"):
        builder.build("faiss_ivf")
