"""A replaced model beside the dense one that it was, and a decoding loop that owes it nothing."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashhead_dist.heads.flashhead import FlashHead
from flashhead_dist.heads.registry import build_head
from flashhead_dist.integrations.transformers import replace_head
from flashhead_dist.models import open_model
from flashhead_dist.parallel import TensorParallel
from tests.integrations.transformers_models import make_index, make_model


@dataclass
class Pair:
    """`dense`, and `index` made of it in `folder`."""

    dense: Any
    index: Path
    folder: Path

    def replaced(self, **options: Any) -> Any:
        """A copy of the dense model with a retrieval head."""
        return replace_head(copy.deepcopy(self.dense), self.index, **options)

    def head(self, **options: Any) -> FlashHead:
        """The head by itself, as the rest of the project builds it."""
        head = build_head(
            "flashhead",
            tp=TensorParallel.single(),
            model=open_model(str(self.folder / "model")),
            index_dir=self.index,
            dtype=self.dense.dtype,
            **options,
        )
        assert isinstance(head, FlashHead)
        return head

    def last_hidden(self, input_ids: Tensor) -> Tensor:
        """`[B, D]`, of the dense model."""
        with torch.no_grad():
            hidden: Tensor = self.dense.model(input_ids).last_hidden_state[:, -1]
        return hidden

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """`count` tokens, without a cache and without transformers' loop; stops at token 1."""
        head, text = self.head(), list(prompt)
        for _ in range(count):
            text.append(int(head(self.last_hidden(torch.tensor([text]))).token_ids[0, 0]))
            if text[-1] == 1:
                break
        return text


@dataclass
class Zoo:
    """Pairs by kind, made once."""

    folder: Path
    _pairs: dict[str, Pair] = field(default_factory=dict)

    def pair(self, kind: str, *, tied: bool = False, **changes: Any) -> Pair:
        name = "_".join(map(str, (kind, tied, *changes.values())))
        if name not in self._pairs:
            folder = self.folder / name
            folder.mkdir()
            model = make_model(kind, tied=tied, **changes)
            self._pairs[name] = Pair(model, make_index(model, folder), folder)
        return self._pairs[name]


def texts(tokens: Tensor) -> list[list[int]]:
    """Token lists without what generate pads after the end."""
    result: list[list[int]] = tokens.tolist()
    return result
