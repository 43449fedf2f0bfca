"""A small Llama of random weights, with a tokenizer of bytes: it decodes in milliseconds."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

STOP = 7


def save_small_llama(folder: Path, context: int, *, names_stop: bool = False) -> None:
    """Save one with an output embedding of `[263, 64]` and a context of `context` tokens.

    names_stop: the tokenizer knows the stop token as one, and leaves it out of texts.
    """
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=263,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        initializer_range=0.3,
        eos_token_id=STOP,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    known = {"eos_token": alphabet[STOP], "pad_token": alphabet[STOP]} if names_stop else {}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **known).save_pretrained(folder)
