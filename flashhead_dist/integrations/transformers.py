"""Replace a transformers model's linear output head by FlashHead.

    model = AutoModelForCausalLM.from_pretrained(...)
    replace_head(model, "path/of/its/index")
    model.generate(...)

See docs/guides/transformers.md for what a retrieval head gives exactly and what it estimates. The
head itself is in `transformers_head`, what `generate` does with it in `transformers_generation`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

import torch
from accelerate.hooks import remove_hook_from_module  # type: ignore[import-untyped]
from accelerate.utils import align_module_device  # type: ignore[import-untyped]
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel

from flashhead_dist.errors import UserError
from flashhead_dist.heads.base import HIDDEN_DTYPES
from flashhead_dist.heads.flashhead import FlashHead
from flashhead_dist.index import IndexManifest, LoadedShard, load_manifest, load_shard
from flashhead_dist.index.shard import with_row_dtype
from flashhead_dist.integrations.transformers_generation import (
    RetrievalGeneration,
    retrieval_class,
)
from flashhead_dist.integrations.transformers_head import RetrievalHead
from flashhead_dist.integrations.transformers_rows import LogitRows
from flashhead_dist.models.contract import fit_contract
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

    >>> import tempfile, torch, flashhead_dist as fh
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = dict(vocab_size=1000, hidden_size=64, intermediate_size=64, num_hidden_layers=1)
    >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))
    >>> folder = tempfile.mkdtemp()
    >>> model.save_pretrained(folder)
    >>> index = fh.build_index(folder, f"{folder}/index", calibrate=False, num_groups=8)
    >>> model = fh.replace_head(model, index)
    >>> model.generate(torch.tensor([[1, 2]]), max_new_tokens=3, min_new_tokens=3).shape
    torch.Size([1, 5])
    """
    if full_logits not in get_args(FullLogits):
        raise UserError(
            f"full_logits {full_logits!r} is unknown: choose from {', '.join(get_args(FullLogits))}"
        )
    linear = _find_linear_head(model)
    contract = fit_contract(type(model), model.config)
    manifest = load_manifest(Path(index))
    _check_sizes(model, linear, manifest)
    with align_module_device(linear):
        device, dtype = linear.weight.device, linear.weight.dtype
        loaded = load_shard(Path(index), device=device)
        _check_rows(model, linear.weight, loaded)
        embedding = _find_tied_embedding(model, linear, tied=contract.tied)
    loaded = with_row_dtype(loaded, dtype)
    flashhead = FlashHead(
        TensorParallel.single(device),
        loaded,
        num_probes=manifest.num_probes if num_probes is None else num_probes,
        alpha=manifest.alpha if alpha is None else alpha,
    )
    head = RetrievalHead(
        LogitRows(flashhead, contract.after_head.final_logits()),
        contract,
        serves_closed_form=full_logits == "closed_form",
    )
    table = loaded.shard.table
    if embedding is not None and table is not None:
        remove_hook_from_module(embedding)
        row_of_token = loaded.token_map.packed  # one rank: the packed code is the row
        model.set_input_embeddings(SharedEmbedding(embedding, table[0], row_of_token))
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
    head = model.retrieval_head.logit_rows.head
    every = torch.arange(head.vocab_size, device=head.shard.rows.device)
    weight = head.index.embedding_lookup(every)
    linear = nn.Linear(head.hidden_size, head.vocab_size, bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    untyped: Any = model
    embedding = untyped.get_input_embeddings()
    if isinstance(embedding, SharedEmbedding):
        original = embedding.unwrap(weight)
        original.weight = linear.weight
        untyped.set_input_embeddings(original)
    untyped.__class__ = type(model).original_class
    untyped.set_output_embeddings(linear)
    return untyped


class SharedEmbedding(nn.Module):
    """A model's own input embedding, reading the rows of an index through a map of token ids.

    The wrapped module does what it always did with a row (Gemma scales it). Its weight is in the
    order of the index, so this module shows none.
    """

    def __init__(self, embedding: nn.Embedding, rows: Tensor, row_of_token: Tensor) -> None:
        """rows: `[r, D]`, not copied; row_of_token: int32 `[V]`."""
        super().__init__()
        embedding.weight = nn.Parameter(rows, requires_grad=False)
        embedding.num_embeddings = len(rows)
        # It only stops gradients, and its row has moved.
        self.padding_idx = embedding.padding_idx
        embedding.padding_idx = None
        self.embedding = embedding
        self.embedding_dim = embedding.embedding_dim
        self.num_embeddings = len(row_of_token)
        self.register_buffer("row_of_token", row_of_token, persistent=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """`[..., D]` of int64 `[...]`; IndexError for an id outside the vocabulary."""
        table: Tensor = self.row_of_token  # type: ignore[assignment]
        rows = table.index_select(0, input_ids.reshape(-1).to(table.device))
        found: Tensor = self.embedding(rows.view(input_ids.shape))
        return found

    def unwrap(self, weight: Tensor) -> nn.Embedding:
        """The wrapped module with `weight [V, D]` in token order."""
        embedding = self.embedding
        embedding.weight = nn.Parameter(weight, requires_grad=False)
        embedding.num_embeddings = len(weight)
        embedding.padding_idx = self.padding_idx
        return embedding


def _find_linear_head(model: Any) -> nn.Linear:
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
    return head


def _check_sizes(model: Any, linear: nn.Linear, manifest: IndexManifest) -> None:
    own = (linear.out_features, linear.in_features)
    if own != (manifest.vocab_size, manifest.hidden_size):
        raise UserError(
            f"the index of {manifest.model_name} is for {manifest.vocab_size} tokens of hidden "
            f"size {manifest.hidden_size}, but {type(model).__name__} has {own[0]} of {own[1]}: "
            "build an index for this model with launch/build_index.py"
        )


def _check_rows(model: Any, weight: Tensor, index: LoadedShard) -> None:
    """Raise UserError unless every row of the index is that token's row of `weight [V, D]`.

    Rows are compared in the weight's dtype, so that a cast model fits the index of its files.
    """
    shard = index.shard
    groups = zip(
        shard.rows, shard.token_ids, shard.pinned_rows, shard.pinned_token_ids, strict=True
    )
    for rows, token_ids, pinned_rows, pinned_ids in groups:
        ids = torch.cat([token_ids.flatten(), pinned_ids]).long()
        stored = torch.cat([rows.flatten(0, 1), pinned_rows]).to(weight.dtype)
        real = ids >= 0
        if not torch.equal(stored[real], weight[ids[real]]):
            raise UserError(
                f"the index of {index.manifest.model_name} holds other weights than the output "
                f"head of this {type(model).__name__}: build one for this model with "
                "launch/build_index.py"
            )


def _find_tied_embedding(model: Any, linear: nn.Linear, *, tied: bool) -> nn.Embedding | None:
    """The input embedding if it is `linear`'s weight; call it where `linear` is aligned."""
    embedding = model.get_input_embeddings()
    if not isinstance(embedding, nn.Embedding):
        return None
    if embedding.weight is linear.weight:
        return embedding
    if not tied:
        return None
    # Offloaded, both are loaded separately and no longer one tensor.
    with align_module_device(embedding):
        same = embedding.weight.shape == linear.weight.shape and torch.equal(
            embedding.weight.to(linear.weight.device), linear.weight
        )
    return embedding if same else None
