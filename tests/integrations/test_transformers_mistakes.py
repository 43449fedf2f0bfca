"""Models and indices that do not fit: one sentence each, and the model as it was."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    LlamaModel,
    PhiConfig,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from flashhead_dist.errors import UserError
from flashhead_dist.integrations.transformers import replace_head, restore_head
from tests.integrations.transformers_models import HIDDEN_SIZE, PROMPT, VOCAB_SIZE, make_config
from tests.integrations.transformers_zoo import Zoo

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "hidden_size": HIDDEN_SIZE, "intermediate_size": 96,
    "num_hidden_layers": 1, "num_attention_heads": 4, "bos_token_id": 2, "eos_token_id": 1,
    "pad_token_id": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def other_models(zoo: Zoo) -> dict[str, tuple[Any, str]]:
    """Models that cannot take the index of the small Llama, and what the sentence must name."""
    llama = make_config("llama", tied=False)
    t5 = T5Config(vocab_size=VOCAB_SIZE, d_model=64, d_kv=16, d_ff=96, num_layers=1, num_heads=4)
    adapted = copy.deepcopy(zoo.pair("llama").dense)
    adapted.lm_head = nn.Sequential(adapted.lm_head)
    packed = copy.deepcopy(zoo.pair("llama").dense).to(torch.float64)
    wide = make_config("llama", tied=False, vocab_size=VOCAB_SIZE + 3)
    other = copy.deepcopy(zoo.pair("llama").dense)
    with torch.no_grad():
        other.lm_head.weight[77, 5] += 0.01
    return {
        "no transformers model": (nn.Linear(2, 2), "not a transformers model"),
        "no head": (LlamaModel(llama), "not a causal language model"),
        "encoder": (BertModel(BertConfig(**SIZES)), "not a causal language model"),
        "encoder and decoder": (T5ForConditionalGeneration(t5), "not a causal language model"),
        "no linear head": (adapted, "output head of Sequential"),
        "float64": (packed, "float64"),
        "bias": (AutoModelForCausalLM.from_config(PhiConfig(**SIZES)), "bias"),
        "vocabulary": (AutoModelForCausalLM.from_config(wide), f"{VOCAB_SIZE + 3} of 64"),
        "one weight": (other, "other weights"),
        "another model": (zoo.pair("llama", seed=5).dense, "other weights"),
    }


NAMES = (
    "no transformers model", "no head", "encoder", "encoder and decoder", "no linear head",
    "float64", "bias", "vocabulary", "one weight", "another model",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_models_that_do_not_fit_are_refused(
    zoo: Zoo, other_models: dict[str, tuple[Any, str]], name: str
) -> None:
    model, words = other_models[name]
    before = type(model), [(key, id(part)) for key, part in model.named_modules()]
    with pytest.raises(UserError, match=words) as caught:
        replace_head(model, zoo.pair("llama").index)
    assert "\n" not in str(caught.value)
    assert before == (type(model), [(key, id(part)) for key, part in model.named_modules()])


@pytest.mark.parametrize(
    "options",
    [{"num_probes": 0}, {"num_probes": 10**6}, {"alpha": float("nan")}, {"full_logits": "some"}],
)
def test_options_out_of_range_are_refused(zoo: Zoo, options: dict[str, Any]) -> None:
    pair = zoo.pair("gemma2", tied=True, final_logit_softcapping=4.0)
    model = copy.deepcopy(pair.dense)
    with pytest.raises(UserError):
        replace_head(model, pair.index, **options)
    prompt = torch.tensor([PROMPT])
    assert torch.equal(model(prompt).logits, pair.dense(prompt).logits)


def test_no_index_and_a_damaged_one(zoo: Zoo, tmp_path: Path) -> None:
    pair = zoo.pair("llama")
    with pytest.raises(UserError, match="build_index"):
        replace_head(copy.deepcopy(pair.dense), tmp_path / "nothing")
    shutil.copytree(pair.index, tmp_path / "damaged")
    with (tmp_path / "damaged" / "index.safetensors").open("r+b") as file:
        file.seek(-9, 2)
        file.write(b"\x55")
    with pytest.raises(UserError, match="damaged"):
        replace_head(copy.deepcopy(pair.dense), tmp_path / "damaged")


@pytest.mark.parametrize("tied", [False, True])
def test_what_would_spoil_a_replaced_model_is_refused(zoo: Zoo, tied: bool, tmp_path: Path) -> None:
    """A tied embedding lies in cluster order: saved or resized as it is, it would be scrambled."""
    pair = zoo.pair("llama", tied=tied)
    model = pair.replaced()
    with pytest.raises(UserError, match="restore_head"):
        model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="restore_head"):
        model.resize_token_embeddings(600)
    with pytest.raises(UserError, match="restore_head"):
        model.to(torch.bfloat16)
    with pytest.raises(UserError, match="restore_head"):
        replace_head(model, pair.index)
    with pytest.raises(AttributeError, match="restore_head"):
        _ = model.get_output_embeddings().weight
    if tied:
        assert not hasattr(model.get_input_embeddings(), "weight")
    with pytest.raises(UserError, match="no retrieval head"):
        restore_head(restore_head(model))
    assert not any(tmp_path.iterdir())


def test_a_cast_model_fits_the_index_of_its_files(zoo: Zoo) -> None:
    pair = zoo.pair("qwen2", tied=True)
    model = replace_head(copy.deepcopy(pair.dense).to(torch.bfloat16), pair.index)
    shard = model.retrieval_head.logit_rows.head.shard
    assert shard.rows.dtype == torch.bfloat16
    prompt = torch.tensor([PROMPT])
    text = model.generate(prompt, do_sample=False, max_new_tokens=6)
    assert text.shape == (1, len(PROMPT) + 6)
    assert model(prompt).logits.dtype == torch.float32
