"""The part of a model below the head: tokens in, last hidden states out, and a way back."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from flashhead_dist.decode.recording import new_cache, record_past, token_positions


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
