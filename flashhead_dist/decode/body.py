"""The part of a model below the head: tokens in, last hidden states out, and a way back.

`TransformersBody` is such a body. Below it: KV caches that can be taken back by tokens on every
supported version of transformers, the positions of a padded batch's tokens (a pipeline stage feeds
both alike), and a tied input embedding that looks tokens up in the head's rows.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from flashhead_dist.errors import UserError
from flashhead_dist.heads.base import Head
from flashhead_dist.parallel import TensorParallel


class Body(Protocol):
    """What a decoding loop needs of a model without its head. One batch at a time."""

    @property
    def device(self) -> torch.device:
        """Where tokens are taken and hidden states come out."""

    def prefill(self, token_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Forget all and read prompts int64 `[B, L]`; the last hidden states `[B, D]`."""

    def step(self, token_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Read one token a sequence, int64 `[B]`; the last hidden states `[B, D]`.

        attention_mask: int64 `[B, all tokens so far]`, None where nothing is padded.
        """

    def rollback(self, num_tokens: int) -> None:
        """Forget the last `num_tokens` tokens of every sequence.

        Must be called, with 0 where all stay, at least as often as the body was told to record.
        """


class TransformersBody:
    """The decoder of a transformers causal LM with its KV cache.

    recording: keep what a rollback needs, which a sliding-window layer otherwise drops.
    """

    def __init__(self, model: Any, *, recording: bool = False) -> None:
        self._decoder = model.get_decoder()
        self._config = self._decoder.config
        self._recording = recording
        self._cache: Any = None

    @property
    def device(self) -> torch.device:
        found: torch.device = next(self._decoder.parameters()).device
        return found

    def prefill(self, token_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        self._cache = new_cache(self._config, recording=self._recording)
        hidden = self._forward(token_ids, attention_mask)
        if self._recording:
            record_past(self._cache)
        return hidden

    def step(self, token_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        return self._forward(token_ids.unsqueeze(1), attention_mask)

    def rollback(self, num_tokens: int) -> None:
        self._cache.crop(-num_tokens)

    def _forward(self, token_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        positions = None
        if attention_mask is not None:
            positions = token_positions(attention_mask, token_ids.shape[1]).to(self.device)
            attention_mask = attention_mask.to(self.device)
        output = self._decoder(
            input_ids=token_ids.to(self.device),
            attention_mask=attention_mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
        )
        last: Tensor = output.last_hidden_state[:, -1]
        return last


def new_cache(config: Any, *, recording: bool) -> Any:
    """An empty KV cache for the layers of `config`, a transformers decoder's.

    recording: `record_past` is to be called on it.

    Raises:
        UserError: recording a state that cannot be rolled back.
    """
    from transformers import DynamicCache

    cache = DynamicCache(config=config)
    if recording and not cache.is_croppable:
        raise UserError(
            f"a {config.model_type} model keeps a state that cannot be rolled back, so lossless "
            "mode cannot serve it: leave it out"
        )
    return cache


def token_positions(attention_mask: Tensor, num_fed: int) -> Tensor:
    """Positions int64 `[B, num_fed]` of the last tokens under a left-padded mask `[B, n]`."""
    return (attention_mask.cumsum(1) - 1).clamp(min=0)[:, -num_fed:]


def record_past(cache: Any) -> None:
    """Make a transformers cache keep what `cache.crop(-n)` needs, from its next token on.

    To be called after the prompt, or a sliding window would keep all of it until the first crop.

    In transformers 5.17 a sliding layer that records shows attention all that it keeps, however
    long that has grown since the last crop, while the mask is as wide as the window; in 5.23 it
    shows the window.
    """
    cache.activate_past_recording()
    for layer in cache.layers:
        if getattr(layer, "is_sliding", False):
            layer.update = partial(_update_and_show_window, layer)


def _update_and_show_window(
    layer: Any, key_states: Tensor, value_states: Tensor, *arguments: Any, **options: Any
) -> tuple[Tensor, Tensor]:
    """`layer.update`, its answers `[B, heads, tokens, head size]` no longer than its mask."""
    keys, values = type(layer).update(layer, key_states, value_states, *arguments, **options)
    visible = layer.sliding_window - 1 + key_states.shape[-2]
    return keys[:, :, -visible:], values[:, :, -visible:]


class HeadEmbedding(nn.Module):
    """Vocabulary-parallel input embedding over a head's rows (Megatron-LM, arXiv 1909.08053,
    section 3: each rank looks up the tokens it holds, and the ranks' rows are summed).
    """

    def __init__(self, head: Head, tp: TensorParallel, scale: float | Tensor | None) -> None:
        """tp: the head's ranks; what the lookups send is accounted here and not with the head.

        scale: what Gemma multiplies its input embedding by.
        """
        super().__init__()
        self._head = head
        self._tp = tp
        self._scale = scale

    def forward(self, token_ids: Tensor) -> Tensor:
        """Rows `[..., D]` of `token_ids` int64 `[...]`, in the dtype of the head's rows."""
        rows = self._tp.run(self._head.embedding_steps(token_ids))
        if self._scale is None:
            return rows
        scale = self._scale.to(rows) if isinstance(self._scale, Tensor) else self._scale
        return rows * scale


def share_embedding(model: Any, head: Head, tp: TensorParallel) -> bool:
    """Let a transformers model look tokens up in `head`, where its embeddings are tied.

    The model's own embedding is let go of. Returns whether this was done: not for an untied model,
    nor for a head that holds no rows.
    """
    embedding = model.get_input_embeddings()
    output = model.get_output_embeddings()
    tied = output is not None and getattr(output, "weight", None) is embedding.weight
    if not tied or not head.holds_rows:
        return False
    scale = getattr(embedding, "embed_scale", None)
    model.set_input_embeddings(HeadEmbedding(head, tp, scale))
    return True
