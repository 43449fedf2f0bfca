"""Greedy texts of the dense head, with the hidden state that each of their tokens was chosen from.

A text of another head is the same up to the first of these states from which that head chooses
another token: until then it is fed the same tokens, so its body makes the same states. One decoding
therefore serves every head and every index.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashhead_dist.decode.body import TransformersBody
from flashhead_dist.decode.loop import decode
from flashhead_dist.decode.prompts import Prompt
from flashhead_dist.decode.sequences import DecodeState
from flashhead_dist.errors import UserError
from flashhead_dist.heads.base import Head, Want
from flashhead_dist.heads.registry import build_head
from flashhead_dist.models import ModelSource, cache_root
from flashhead_dist.models.cache import cached_tensors
from flashhead_dist.parallel import TensorParallel

DENSE = "dense_local_max"
BODY_DTYPE = torch.float32
_VERSION = 1


@dataclass(frozen=True)
class Batch:
    """Prompts decoded together: a row's hidden states depend on the shape of its batch."""

    first: int
    """Number of the first prompt."""
    prompts: tuple[Prompt, ...]
    token_ids: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class DenseTexts:
    """What a batch's dense decoding gave.

    token_ids int64 `[B, T]`; states float32 `[B, T, D]`, from which each token was chosen.
    """

    batch: Batch
    token_ids: Tensor
    states: Tensor


class TextDecoder:
    """The body of a model, loaded when it is first needed, and greedy decoding over it."""

    def __init__(self, model: ModelSource, *, max_new_tokens: int, batch_size: int) -> None:
        """Raises UserError for less than one token or one prompt a batch, or no body."""
        if max_new_tokens < 1:
            raise UserError(f"--max-new-tokens {max_new_tokens} is too small: give at least 1")
        if batch_size < 1:
            raise UserError(f"--batch-size {batch_size} is too small: give at least 1")
        self.model = model
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size
        self._loaded: tuple[Any, Any] | None = None
        self._dense: Head | None = None

    def batches(self, prompts: Sequence[Prompt]) -> list[Batch]:
        """The prompts as token ids, `batch_size` at a time in the order given.

        Raises:
            UserError: a prompt without tokens, or one that does not fit the model's context.
        """
        tokenizer = self._load()[1]
        decoder = self._load()[0].get_decoder()
        limit = getattr(decoder.config, "max_position_embeddings", None)
        rows = [tuple(tokenizer(prompt.text).input_ids) for prompt in prompts]
        for number, row in enumerate(rows, start=1):
            if not row:
                raise UserError(f"prompt {number} has no tokens: write something in it")
            if limit is not None and len(row) + self.max_new_tokens > limit:
                raise UserError(
                    f"prompt {number} has {len(row)} tokens and {self.max_new_tokens} new ones are "
                    f"asked for, more than the model's context of {limit}: shorten it, or give "
                    f"fewer --max-new-tokens"
                )
        return [
            Batch(
                first,
                tuple(prompts[first : first + self.batch_size]),
                tuple(rows[first : first + self.batch_size]),
            )
            for first in range(0, len(rows), self.batch_size)
        ]

    @property
    def stop_token_ids(self) -> frozenset[int]:
        """Tokens that end a text; decoding goes on after them all the same."""
        stops = self._load()[0].generation_config.eos_token_id
        return frozenset([stops] if isinstance(stops, int) else stops or [])

    def text(self, token_ids: Sequence[int]) -> str:
        """What the tokens say."""
        return str(self._load()[1].decode(list(token_ids)))

    def dense_texts(self, batch: Batch) -> DenseTexts:
        """The dense head's texts, kept in the cache by weights, prompts and length."""
        settings = [_VERSION, self.model.weight_hash, self.model.name, self.max_new_tokens]
        key = json.dumps([*settings, str(BODY_DTYPE), batch.token_ids])
        name = f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
        path = cache_root() / "texts" / name

        def compute() -> dict[str, Tensor]:
            self._dense = self._dense or build_head(
                DENSE, tp=TensorParallel.single(), model=self.model
            )
            tokens, states = self.decode(batch, self._dense)
            return {"token_ids": tokens, "states": states}

        return DenseTexts(batch, **cached_tensors(path, compute))

    def decode(self, batch: Batch, head: Head) -> tuple[Tensor, Tensor]:
        """Decode with any head: its tokens int64 `[B, T]` and their states float32 `[B, T, D]`."""
        state = DecodeState(
            batch.token_ids,
            max_new_tokens=self.max_new_tokens,
            pad_token_id=self._load()[1].pad_token_id or 0,
            first_sequence=batch.first,
        )
        kept: list[Tensor] = []

        def choose(hidden: Tensor, positions: Tensor, sequences: Tensor) -> Tensor:
            kept.append(hidden.float().cpu())
            return head.serve(hidden, Want()).token_ids[:, 0]

        decode(TransformersBody(self._load()[0]), state, choose)
        tokens = torch.tensor([state.tokens(row) for row in range(state.batch_size)])
        return tokens, torch.stack(kept, dim=1).contiguous()

    def _load(self) -> tuple[Any, Any]:
        if self._loaded is None:
            self._loaded = self.model.load_body(BODY_DTYPE)
        return self._loaded
