"""Put FlashHead in the place of a transformers model's linear output head.

    model = AutoModelForCausalLM.from_pretrained(...)
    replace_head(model, "path/of/its/index")
    model.generate(...)

See docs/transformers.md for what a retrieval head gives exactly and what it estimates.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

import torch
from accelerate.hooks import remove_hook_from_module  # type: ignore[import-untyped]
from accelerate.utils import align_module_device  # type: ignore[import-untyped]
from torch import nn

from flashhead_dist.errors import UserError
from flashhead_dist.heads.flashhead import FlashHead
from flashhead_dist.index import load_manifest, load_shard
from flashhead_dist.index.row_block import with_row_dtype
from flashhead_dist.integrations.transformers_checks import (
    check_rows,
    check_sizes,
    find_linear_head,
    find_tied_embedding,
)
from flashhead_dist.integrations.transformers_embedding import SharedEmbedding
from flashhead_dist.integrations.transformers_generation import (
    RetrievalGeneration,
    retrieval_class,
)
from flashhead_dist.integrations.transformers_head import RetrievalHead
from flashhead_dist.integrations.transformers_rows import LogitRows
from flashhead_dist.integrations.transformers_tail import measure_final_logits
from flashhead_dist.parallel import TensorParallel

FullLogits = Literal["closed_form", "error"]


def replace_head(
    model: Any,
    index: str | Path,
    *,
    num_probes: int | None = None,
    alpha: float | None = None,
    full_logits: FullLogits = "closed_form",
) -> Any:
    """Replace the output head of `model` by a retrieval head over the stored `index`, in place.

    model: a causal language model of transformers with a linear output head, in its dtype and on
        its devices, offloaded by accelerate or not. A tied input embedding then reads the rows of
        the index, so that they are held once.
    index: the folder that launch/build_index.py wrote for this model.
    num_probes, alpha: the index's own where None; see `heads.flashhead.IndexHead`.
    full_logits: what to do where a value for every token is asked for: give the closed form, at
        the cost of a dense head, or raise UserError.

    Returns the same model. Its head is placed where the old one ran.

    Raises:
        UserError: a model of another kind, an index of other weights or another vocabulary, or an
            option out of range. The model is then as it was.
    """
    if full_logits not in get_args(FullLogits):
        raise UserError(
            f"full_logits {full_logits!r} is unknown: choose from {', '.join(get_args(FullLogits))}"
        )
    linear = find_linear_head(model)
    manifest = load_manifest(Path(index))
    check_sizes(model, linear, manifest)
    with align_module_device(linear):
        device, dtype = linear.weight.device, linear.weight.dtype
        shard = load_shard(Path(index), device=device)
        check_rows(model, linear.weight, shard)
        embedding = find_tied_embedding(model, linear)
    final = measure_final_logits(model, linear)
    shard = with_row_dtype(shard, dtype)
    flashhead = FlashHead(
        TensorParallel.single(device),
        shard,
        num_probes=manifest.num_probes if num_probes is None else num_probes,
        alpha=manifest.alpha if alpha is None else alpha,
    )
    head = RetrievalHead(
        LogitRows(flashhead, final), serves_closed_form=full_logits == "closed_form"
    )
    if embedding is not None and shard.table is not None:
        remove_hook_from_module(embedding)
        row_of_token = shard.token_map.packed  # one rank: the packed code is the row
        model.set_input_embeddings(SharedEmbedding(embedding, shard.table[0], row_of_token))
    if final.softcap:
        # The head caps its logits itself, so that closed-form rows can be shifted after the cap.
        model.config.get_text_config().final_logit_softcapping = None
    model.set_output_embeddings(head)
    own_class: Any = type(model)
    model.__class__ = retrieval_class(own_class)
    return model


def restore_head(model: Any) -> Any:
    """Undo `replace_head`: a dense linear head again, tied to the input embedding if it was.

    Weights are those of the index; offloading of the two embeddings by accelerate is not restored.

    Raises:
        UserError: the model has no retrieval head.
    """
    if not isinstance(model, RetrievalGeneration):
        raise UserError(
            f"this {type(model).__name__} has no retrieval head to take out: "
            "replace_head(model, index) puts one in"
        )
    rows = model.retrieval_head.logit_rows
    shard = rows.head.shard
    every = torch.arange(rows.vocab_size, device=shard.rows.device)
    weight = shard.embedding_lookup(every)
    linear = nn.Linear(rows.head.hidden_size, rows.vocab_size, bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    untyped: Any = model
    embedding = untyped.get_input_embeddings()
    if isinstance(embedding, SharedEmbedding):
        original = embedding.unwrap(weight)
        original.weight = linear.weight
        untyped.set_input_embeddings(original)
    untyped.__class__ = type(model).original_class
    untyped.set_output_embeddings(linear)
    if rows.final.softcap:
        untyped.config.get_text_config().final_logit_softcapping = rows.final.softcap
    return untyped
