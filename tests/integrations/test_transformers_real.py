"""A replaced head in Gemma-3-270M: the project's own tokens and distribution, and one embedding."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flashhead_dist.heads.distribution import closed_form
from flashhead_dist.heads.registry import build_head
from flashhead_dist.index import ensure_index
from flashhead_dist.integrations.transformers import replace_head
from flashhead_dist.models import ModelSource, open_model
from flashhead_dist.parallel import TensorParallel

pytestmark = [pytest.mark.real, pytest.mark.timeout(1800)]

TEXTS = ("The capital of France is", "def fibonacci(n):", "Es war einmal ein", "今日の天気は")
NEW = 32
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": NEW}


@pytest.fixture(scope="module")
def source() -> ModelSource:
    return open_model()


@pytest.fixture(scope="module")
def index(source: ModelSource) -> Path:
    return ensure_index(source)


@pytest.fixture(scope="module")
def models(source: ModelSource, index: Path) -> tuple[Any, Any, Any]:
    """Dense, replaced, tokenizer."""
    dense, tokenizer = source.load_body(torch.float32)
    tokenizer.padding_side = "left"
    return dense, replace_head(copy.deepcopy(dense), index), tokenizer


@torch.no_grad()
def test_greedy_texts_are_the_heads_own(
    source: ModelSource, index: Path, models: tuple[Any, Any, Any]
) -> None:
    dense, replaced, tokenizer = models
    head = build_head(
        "flashhead",
        tp=TensorParallel.single(),
        model=source,
        index_dir=index,
        dtype=torch.float32,
    )
    for text in TEXTS:
        given = tokenizer(text, return_tensors="pt")
        found = replaced.generate(**given, **GREEDY)
        # Every position at once: what the head says of the text, token by token.
        hidden = dense.model(found[:, :-1]).last_hidden_state[0, given.input_ids.shape[1] - 1 :]
        assert (
            found[0, given.input_ids.shape[1] :].tolist() == head(hidden).token_ids[:, 0].tolist()
        )


@torch.no_grad()
def test_values_are_the_closed_form_and_near_the_dense_models(
    source: ModelSource, index: Path, models: tuple[Any, Any, Any]
) -> None:
    dense, replaced, tokenizer = models
    head = build_head(
        "flashhead",
        tp=TensorParallel.single(),
        model=source,
        index_dir=index,
        dtype=torch.float32,
    )
    given = tokenizer(TEXTS[0], return_tensors="pt")
    found: Tensor = replaced(**given).logits[0].log_softmax(-1)
    wanted = closed_form(head, dense.model(**given).last_hidden_state[0]).unnormalized()
    assert float((found - wanted.log_softmax(-1)).abs().max()) < 1e-3
    exact: Tensor = dense(**given).logits[0].softmax(-1)
    assert float(0.5 * (found.exp() - exact).abs().sum(-1).max()) < 0.05


def test_batches_and_prompt_lookup_give_the_same_texts(models: tuple[Any, Any, Any]) -> None:
    _, replaced, tokenizer = models
    batch = tokenizer(list(TEXTS), return_tensors="pt", padding=True)
    together = replaced.generate(**batch, **GREEDY)[:, -NEW:]
    for row, text in enumerate(TEXTS):
        given = tokenizer(text, return_tensors="pt")
        alone = replaced.generate(**given, **GREEDY)
        looked_up = replaced.generate(**given, prompt_lookup_num_tokens=4, **GREEDY)
        assert torch.equal(looked_up, alone)
        new = alone[0, given.input_ids.shape[1] :]
        assert torch.equal(together[row, : len(new)], new)


def test_assisted_texts_are_the_targets_own(models: tuple[Any, Any, Any]) -> None:
    dense, replaced, tokenizer = models
    given = tokenizer(TEXTS[1], return_tensors="pt")
    for target, draft in ((dense, replaced), (replaced, dense), (replaced, replaced)):
        own = target.generate(**given, **GREEDY)
        assert torch.equal(target.generate(**given, assistant_model=draft, **GREEDY), own)
