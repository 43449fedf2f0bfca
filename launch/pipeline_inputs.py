"""Inputs of launch/bench_pipeline.py: prompts for a model, or stages that only sleep."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from flashhead_dist.errors import UserError
from flashhead_dist.states.texts import shipped_texts

_VOCAB = 64


def sleeping_model(num_layers: int, sleep_ms: float) -> Any:
    """A Llama too small to take time, whose decoder sleeps `sleep_ms` before each forward pass.

    It sleeps without a core, so that more stages than cores overlap as if each had its own.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=_VOCAB,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=num_layers,
            num_attention_heads=1,
        )
    )

    def sleep(*_: Any) -> None:
        time.sleep(sleep_ms / 1e3)

    model.get_decoder().register_forward_pre_hook(sleep)
    return model.eval()


def synthetic_prompts(count: int, length: int) -> list[list[int]]:
    """Prompts for `sleeping_model`."""
    return [[(number + i) % _VOCAB for i in range(length)] for number in range(count)]


def corpus_prompts(tokenizer: Any, count: int, length: int) -> list[list[int]]:
    """The beginnings of `count` shipped texts, of `length` tokens each.

    Raises:
        UserError: too few texts are that long.
    """
    prompts: list[list[int]] = []
    for document in shipped_texts():
        ids: Sequence[int] = tokenizer(document.text[: 20 * length]).input_ids[:length]
        if len(ids) == length:
            prompts.append(list(ids))
        if len(prompts) == count:
            return prompts
    raise UserError(
        f"the shipped texts give {len(prompts)} prompts of {length} tokens, fewer than {count}: "
        f"make --prompt-tokens, --batch-size or --micro-batches smaller"
    )
