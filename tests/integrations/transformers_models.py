"""Small causal language models with random weights, and an index of each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GenerationConfig,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from flashhead_dist.index import IndexOptions, build_index
from flashhead_dist.models import open_model

VOCAB_SIZE, HIDDEN_SIZE = 509, 64
CONFIGS: dict[str, type[Any]] = {
    "gemma2": Gemma2Config,
    "gemma3": Gemma3TextConfig,
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
}
PROMPT = [5, 17, 301, 44, 78, 5, 17]


def make_config(kind: str, *, tied: bool, **changes: Any) -> Any:
    """Two layers; Gemma attends over a sliding window of 16 tokens in the first."""
    settings: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "tie_word_embeddings": tied,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    if kind.startswith("gemma"):
        settings["sliding_window"] = 16
    return CONFIGS[kind](**(settings | changes))


def make_model(kind: str, *, tied: bool, seed: int = 0, **changes: Any) -> Any:
    """Weights so large that greedy texts vary and distributions are neither flat nor a spike."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(make_config(kind, tied=tied, **changes)).eval()
    clusters = torch.randn(60, HIDDEN_SIZE)
    rows = clusters[torch.randint(60, (VOCAB_SIZE,))] + 0.5 * torch.randn(VOCAB_SIZE, HIDDEN_SIZE)
    with torch.no_grad():
        model.get_output_embeddings().weight.copy_(0.35 * rows)
        for layer in model.model.layers:
            for weight in layer.parameters():
                if weight.ndim == 2:
                    weight.mul_(6)
    model.generation_config = GenerationConfig(bos_token_id=2, eos_token_id=1, pad_token_id=0)
    return model


def make_index(model: Any, folder: Path, **options: Any) -> Path:
    """Store `model` in `folder` and build its index there: 4 groups of clusters of 4 tokens."""
    model.save_pretrained(folder / "model")
    choices: dict[str, Any] = {"num_groups": 4, "num_probes": 16, "alpha": 0.02}
    choices |= {"pinned_token_ids": (1, 300)} | options
    return build_index(
        open_model(str(folder / "model")),
        IndexOptions(**choices),
        calibration=None,
        test=None,
        out=folder / "index",
        device="cpu",
        progress=False,
    )
