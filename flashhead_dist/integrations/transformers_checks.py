"""Whether a model and an index fit each other, before anything of the model is changed."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import align_module_device  # type: ignore[import-untyped]
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel

from flashhead_dist.errors import UserError
from flashhead_dist.heads.base import HIDDEN_DTYPES
from flashhead_dist.index import IndexManifest, IndexShard
from flashhead_dist.integrations.transformers_generation import RetrievalGeneration


def find_linear_head(model: Any) -> nn.Linear:
    """The output head of a causal language model.

    Raises:
        UserError: another kind of model, or a head that is no plain linear layer.
    """
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise UserError(
            f"{name} is not a transformers model: load one with "
            "transformers.AutoModelForCausalLM.from_pretrained"
        )
    untyped: Any = model
    if isinstance(model, RetrievalGeneration):
        raise UserError(
            f"this {name} has a retrieval head already: take it out with restore_head(model) first"
        )
    if not isinstance(model, GenerationMixin) or untyped.config.is_encoder_decoder:
        raise UserError(
            f"{name} is not a causal language model: load one with "
            "transformers.AutoModelForCausalLM.from_pretrained"
        )
    head = untyped.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.weight.dtype not in HIDDEN_DTYPES:
        found = "no output head" if head is None else f"an output head of {type(head).__name__}"
        if isinstance(head, nn.Linear):
            found += f" in {head.weight.dtype}"
        raise UserError(
            f"{name} has {found}: FlashHead replaces a linear one in float32, bfloat16 or float16"
        )
    if head.bias is not None:
        raise UserError(
            f"the output head of this {name} has a bias, which an index does not hold: keep its "
            "own head"
        )
    return head


def check_sizes(model: Any, linear: nn.Linear, manifest: IndexManifest) -> None:
    """Raise UserError unless the index is of `linear`'s vocabulary and hidden size."""
    own = (linear.out_features, linear.in_features)
    if own != (manifest.vocab_size, manifest.hidden_size):
        raise UserError(
            f"the index of {manifest.model_name} is for {manifest.vocab_size} tokens of hidden "
            f"size {manifest.hidden_size}, but {type(model).__name__} has {own[0]} of {own[1]}: "
            "build an index for this model with launch/build_index.py"
        )


def check_rows(model: Any, weight: Tensor, shard: IndexShard) -> None:
    """Raise UserError unless every row of the index is that token's row of `weight [V, D]`.

    Rows are compared in the weight's dtype, so that a cast model fits the index of its files.
    """
    groups = zip(
        shard.rows, shard.token_ids, shard.pinned_rows, shard.pinned_token_ids, strict=True
    )
    for rows, token_ids, pinned_rows, pinned_ids in groups:
        ids = torch.cat([token_ids.flatten(), pinned_ids]).long()
        kept = torch.cat([rows.flatten(0, 1), pinned_rows]).to(weight.dtype)
        real = ids >= 0
        if not torch.equal(kept[real], weight[ids[real]]):
            raise UserError(
                f"the index of {shard.manifest.model_name} holds other weights than the output "
                f"head of this {type(model).__name__}: build one for this model with "
                "launch/build_index.py"
            )


def find_tied_embedding(model: Any, linear: nn.Linear) -> nn.Embedding | None:
    """The input embedding if it is `linear`'s weight; call it where `linear` is aligned."""
    embedding = model.get_input_embeddings()
    if not isinstance(embedding, nn.Embedding):
        return None
    if embedding.weight is linear.weight:
        return embedding
    if not getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        return None
    # Offloaded, both are loaded apart and no longer one tensor.
    with align_module_device(embedding):
        same = embedding.weight.shape == linear.weight.shape and torch.equal(
            embedding.weight.to(linear.weight.device), linear.weight
        )
    return embedding if same else None
