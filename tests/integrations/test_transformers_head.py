"""replace_head on small models of each kind: greedy texts, values, and weights held once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from flashhead_dist.heads.distribution import closed_form
from flashhead_dist.integrations.transformers import SharedEmbedding, restore_head
from flashhead_dist.models import OutputContract
from tests.integrations.transformers_models import PROMPT, VOCAB_SIZE
from tests.integrations.transformers_zoo import Pair, Zoo

KINDS = ("gemma3", "llama", "qwen2", "qwen3")


def every_probe(pair: Pair) -> int:
    return pair.head().index.manifest.num_clusters


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_text_is_the_heads_own(zoo: Zoo, kind: str, tied: bool) -> None:
    pair = zoo.pair(kind, tied=tied)
    model = pair.replaced()
    found = model.generate(torch.tensor([PROMPT]), max_new_tokens=24, do_sample=False)
    assert found[0].tolist() == pair.greedy(PROMPT, 24)


def test_the_small_models_miss_often_enough_to_tell_heads_apart(zoo: Zoo) -> None:
    """Else a replaced model that quietly kept its dense head would pass every test here."""
    prompt = torch.tensor([PROMPT])
    for kind in KINDS:
        pair = zoo.pair(kind)
        dense = pair.dense.generate(prompt, max_new_tokens=24, do_sample=False)
        assert dense[0].tolist() != pair.greedy(PROMPT, 24), kind


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", [*KINDS, "gemma2"])
def test_probing_everything_gives_the_dense_models_values(zoo: Zoo, kind: str, tied: bool) -> None:
    changes = {"final_logit_softcapping": 4.0} if kind == "gemma2" else {}
    pair = zoo.pair(kind, tied=tied, **changes)
    model = pair.replaced(num_probes=every_probe(pair))
    prompt = torch.tensor([PROMPT])
    with torch.no_grad():
        dense = pair.dense(prompt, labels=prompt)
        assert torch.allclose(model(prompt).logits, dense.logits, atol=2e-5)
        loss, logits = model(prompt, labels=prompt, return_dict=False)[:2]
        assert torch.allclose(loss, dense.loss)
        assert torch.allclose(logits, dense.logits, atol=2e-5)
    options: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False}
    for more in ({}, {"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 2}):
        found = model.generate(prompt, **options, **more)
        assert torch.equal(found, pair.dense.generate(prompt, **options, **more)), more


@pytest.mark.parametrize("cap", [None, 4.0])
def test_a_forward_pass_gives_the_closed_form(zoo: Zoo, cap: float | None) -> None:
    """Against the head's own; flat rows, or the cap applied twice, would be far off."""
    pair = zoo.pair("gemma2", final_logit_softcapping=cap)
    model, prompt = pair.replaced(), torch.tensor([PROMPT])
    with torch.no_grad():
        found = model(prompt).logits[:, -1]
    form = closed_form(
        pair.head(), pair.last_hidden(prompt), contract=OutputContract(softcap=cap or 0.0)
    )
    assert torch.allclose(found.exp().sum(1).log(), form.unnormalized().logsumexp(1), atol=1e-4)
    assert torch.allclose(found, form.unnormalized(), atol=1e-4)
    assert not torch.allclose(found, form.unnormalized(flat=True), atol=0.1)


def test_tied_weights_are_held_once(zoo: Zoo) -> None:
    pair = zoo.pair("gemma3", tied=True)
    model = pair.replaced()
    embedding = model.get_input_embeddings()
    shard = model.retrieval_head.logit_rows.head.shard
    assert isinstance(embedding, SharedEmbedding)
    assert embedding.embedding.weight.data_ptr() == shard.rows.data_ptr()
    every = torch.arange(VOCAB_SIZE).view(1, -1)
    assert torch.equal(embedding(every), pair.dense.get_input_embeddings()(every))
    kept = sum(p.numel() for p in model.parameters())
    pads = embedding.embedding.weight.numel() - pair.dense.lm_head.weight.numel()
    assert kept - pads == sum(p.numel() for p in pair.dense.parameters())
    for outside in (VOCAB_SIZE, -1):
        with pytest.raises(IndexError):
            embedding(torch.tensor([outside]))


@pytest.mark.parametrize("tied", [False, True])
def test_restore_head_undoes_it(zoo: Zoo, tied: bool, tmp_path: Path) -> None:
    pair = zoo.pair("gemma2", tied=tied, final_logit_softcapping=4.0)
    model = restore_head(pair.replaced())
    assert type(model) is type(pair.dense)
    assert model.config.final_logit_softcapping == 4.0
    before, after = pair.dense.state_dict(), model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    prompt = torch.tensor([PROMPT])
    assert torch.equal(again(prompt).logits, pair.dense(prompt).logits)
