"""Causal language models of a few small layers and random weights."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}


def small_model(model_type: str = "llama", *, seed: int = 6, **shape: Any) -> Any:
    """A model of `SHAPE`, changed by `shape`, in eval mode; the same weights for the same seed."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **(SHAPE | shape))
    return AutoModelForCausalLM.from_config(config).eval()


def greedy_text(model: Any, prompt: list[int], num_tokens: int) -> list[int]:
    """The tokens that transformers generates after `prompt`, past any stop token."""
    output = model.generate(
        torch.tensor([prompt]), max_new_tokens=num_tokens, do_sample=False, eos_token_id=None
    )
    text: list[int] = output[0, len(prompt) :].tolist()
    return text
