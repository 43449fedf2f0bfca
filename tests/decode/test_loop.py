"""The token loop over real transformers bodies, windows that slide included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from flashhead_dist.decode.body import TransformersBody
from flashhead_dist.decode.loop import Choose, decode
from flashhead_dist.decode.sequences import DecodeState

VOCAB = 97
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12, 13], [3, 1, 4, 1]]


def tiny(kind: str) -> PreTrainedModel:
    torch.manual_seed(3)
    shape: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "initializer_range": 0.4,
    }
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**shape)).eval()
    layers = ["sliding_attention", "full_attention"]
    return Gemma3ForCausalLM(Gemma3TextConfig(**shape, sliding_window=6, layer_types=layers)).eval()


def dense(model: PreTrainedModel) -> Choose:
    def choose(hidden: Tensor, positions: Tensor, sequences: Tensor) -> Tensor:
        return model.lm_head(hidden).argmax(-1)

    return choose


def often_wrong(model: PreTrainedModel) -> Choose:
    """The second best token at every third place: what a bad retrieval head would do."""

    def choose(hidden: Tensor, positions: Tensor, sequences: Tensor) -> Tensor:
        best = model.lm_head(hidden).topk(2).indices
        return torch.where((positions + sequences) % 3 == 0, best[:, 1], best[:, 0])

    return choose


def texts(model: PreTrainedModel, choose: Choose, prompts: list[list[int]], **options: Any) -> Any:
    state = DecodeState(prompts, max_new_tokens=24, **options)
    body = TransformersBody(model, recording=state.check_every > 0)
    times = decode(body, state, choose, confirm=dense(model) if state.check_every else None)
    return state, times, [state.tokens(row) for row in range(len(prompts))]


def reference(model: PreTrainedModel, prompt: list[int]) -> list[int]:
    output = model.generate(
        torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=None
    )
    return output[0, len(prompt) :].tolist()


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_the_loop_decodes_what_transformers_decodes(kind: str) -> None:
    model = tiny(kind)
    for prompt in PROMPTS:
        assert texts(model, dense(model), [prompt])[2] == [reference(model, prompt)]


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_a_left_padded_batch_decodes_each_prompt_as_if_alone(kind: str) -> None:
    model = tiny(kind)
    assert texts(model, dense(model), PROMPTS)[2] == [reference(model, p) for p in PROMPTS]


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@pytest.mark.parametrize("check_every", [1, 4, 9])
def test_lossless_rolls_the_cache_back(kind: str, check_every: int) -> None:
    """Without the crop, or with one token too few, the texts part."""
    model = tiny(kind)
    for prompts in ([PROMPTS[0]], PROMPTS):
        expected = texts(model, dense(model), prompts)[2]
        assert texts(model, often_wrong(model), prompts)[2] != expected
        state, times, found = texts(model, often_wrong(model), prompts, check_every=check_every)
        assert found == expected
        assert state.counts.rollbacks > 2
        assert times.check_s > 0


def test_a_window_that_has_slid_cannot_be_rolled_back_without_recording() -> None:
    """Why the body must be told: otherwise lossless mode would fail late, on long texts only."""
    model = tiny("gemma3")
    state = DecodeState([PROMPTS[0]], max_new_tokens=24, check_every=4)
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        decode(TransformersBody(model), state, often_wrong(model), confirm=dense(model))


def test_times_add_up() -> None:
    model = tiny("llama")
    state, times, _ = texts(model, dense(model), [PROMPTS[0]])
    assert len(times.step_s) == state.num_steps - 1
    assert times.total_s >= times.first_token_s + sum(times.step_s)
    assert 0 < times.head_s < times.total_s
    assert times.per_output_token_s(24) == (times.total_s - times.first_token_s) / 23
