"""The few facts of a Hugging Face `config.json` that an output head depends on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashhead_dist.models.errors import ModelSourceError

_HEAD_NAMES = (
    "lm_head.weight",
    "language_model.lm_head.weight",
    "model.lm_head.weight",
    "embed_out.weight",
    "output.weight",
)
_EMBEDDING_NAMES = (
    "model.embed_tokens.weight",
    "embed_tokens.weight",
    "language_model.model.embed_tokens.weight",
    "model.language_model.embed_tokens.weight",
    "language_model.embed_tokens.weight",
    "transformer.wte.weight",
    "wte.weight",
    "gpt_neox.embed_in.weight",
)
_LOGIT_SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier")


@dataclass(frozen=True)
class HeadConfig:
    """`tied` is None where the configuration leaves it to the weights; so with `vocab_size`."""

    path: Path
    model_type: str
    tied: bool | None
    vocab_size: int | None
    final_logit_softcap: float | None


def read_config(path: Path) -> HeadConfig:
    """Read `config.json`.

    Raises ModelSourceError where it is missing or no JSON, or where the model scales its logits.
    """
    try:
        top = json.loads(path.read_text(encoding="utf-8"))
        text: dict[str, Any] = {**top, **top.get("text_config", {})}
    except FileNotFoundError as error:
        raise ModelSourceError(
            f"{path.parent} has no config.json; name a Hugging Face model folder or a .gguf file."
        ) from error
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ModelSourceError(
            f"{path} is no readable configuration; fetch the model again."
        ) from error
    for key in _LOGIT_SCALES:
        if text.get(key) not in (None, 1, 1.0):
            raise ModelSourceError(
                f"{path} sets {key}={text[key]}, a scaled output head, which is not supported; "
                "use a model with a plain linear head."
            )
    return HeadConfig(
        path=path,
        model_type=str(text.get("model_type", "unknown")),
        # transformers ties by the outer configuration, where a multimodal model has two.
        tied=top.get("tie_word_embeddings", text.get("tie_word_embeddings")),
        vocab_size=text.get("vocab_size"),
        final_logit_softcap=text.get("final_logit_softcapping"),
    )


def choose_output_embedding(config: HeadConfig, names: set[str]) -> tuple[str, bool]:
    """Name of the stored output embedding among `names`, and whether it is the input embedding.

    Raises ModelSourceError where there is none: no linear head, or its weights are not stored.
    """
    head = next((n for n in _HEAD_NAMES if n in names), None)
    embedding = next((n for n in _EMBEDDING_NAMES if n in names), None)
    if head is not None and head.removesuffix("weight") + "bias" in names:
        raise ModelSourceError(
            f"The output head of {config.path.parent} has a bias, which is not supported; "
            "use a model with a plain linear head."
        )
    if head is not None and not config.tied:
        return head, False
    if embedding is not None and config.tied is not False:
        return embedding, True
    raise ModelSourceError(
        f"{config.path.parent} (model_type {config.model_type}) has no linear output head that "
        "is known here; use a causal language model such as Llama, Qwen2, Qwen3 or Gemma-3."
    )
