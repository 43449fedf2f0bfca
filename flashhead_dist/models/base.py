"""A model as this project sees it: rows of an output embedding, and a body on demand.

Words: V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch

from flashhead_dist.errors import ModelSourceError
from flashhead_dist.models.contract import OutputContract


class RowStore(Protocol):
    """The stored output embedding [V, D], read piece by piece."""

    @property
    def shape(self) -> tuple[int, int]:
        """(V, D)."""

    @property
    def dtype(self) -> torch.dtype:
        """What the rows are read in by default."""

    def read_rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows [stop - start, D], reading no byte of the others."""

    def read_columns(self, start: int, stop: int) -> torch.Tensor:
        """Columns [V, stop - start], holding little more than the result at any time."""

    def stored_chunks(self) -> Iterator[bytes]:
        """The stored bytes in order, in pieces of bounded size."""

    def fingerprint(self) -> str:
        """Changes whenever the stored bytes may have: a key for what is derived from them."""


@dataclass(frozen=True)
class ModelSource:
    """Where output-embedding rows come from.

    `dtype` is what `read_rows` and `read_columns` return. `tied` says whether the output embedding
    is the input embedding as well. `path` is the folder or file, None for a synthetic model.
    `find_contract` may take seconds the first time.
    """

    name: str
    dtype: torch.dtype
    rows: RowStore = field(repr=False)
    hash_rows: Callable[[RowStore], str] = field(repr=False)
    path: Path | None = None
    synthetic: bool = False
    tied: bool = False
    find_contract: Callable[[], OutputContract] = field(default=OutputContract, repr=False)
    body_loader: Callable[[torch.dtype | None], tuple[Any, Any]] | None = field(
        default=None, repr=False
    )
    tokenizer_loader: Callable[[], Any] | None = field(default=None, repr=False)

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.rows.shape[0]

    @property
    def hidden_size(self) -> int:
        """D."""
        return self.rows.shape[1]

    @cached_property
    def contract(self) -> OutputContract:
        """What becomes of products of hidden states and rows.

        Raises ModelSourceError where the model's class does more than a contract can express.
        """
        return self.find_contract()

    @cached_property
    def weight_hash(self) -> str:
        """Hex sha256 of the stored output-embedding bytes."""
        return self.hash_rows(self.rows)

    def read_rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows [stop - start, D] of the output embedding, on the CPU; only these are read.

        Raises ValueError unless 0 <= start <= stop <= V, ModelSourceError where the file is
        shorter than its header says.
        """
        _check_range(start, stop, self.vocab_size)
        return self.rows.read_rows(start, stop).to(self.dtype)

    def read_columns(self, start: int, stop: int) -> torch.Tensor:
        """Columns [V, stop - start] of the output embedding, on the CPU.

        Raises ValueError unless 0 <= start <= stop <= D.
        """
        _check_range(start, stop, self.hidden_size)
        return self.rows.read_columns(start, stop).to(self.dtype)

    def load_body(self, dtype: torch.dtype | None = None) -> tuple[Any, Any]:
        """The whole transformers model (eval mode, CPU) and its tokenizer.

        Raises ModelSourceError where there is no body: a synthetic model.
        """
        if self.body_loader is None:
            raise ModelSourceError(
                f"{self.name} is synthetic and has no body to run; name a real model with --model."
            )
        return self.body_loader(dtype)

    def special_token_ids(self) -> tuple[int, ...]:
        """Ids of the tokens that the tokenizer names (end of text, unknown, ...), ascending.

        Empty where there is no tokenizer. Reading one takes seconds.

        Raises ModelSourceError where transformers cannot load the tokenizer.
        """
        tokenizer = self.tokenizer_loader() if self.tokenizer_loader else None
        named = tokenizer.all_special_ids if tokenizer else ()
        return tuple(sorted({token for token in named if 0 <= token < self.vocab_size}))


def _check_range(start: int, stop: int, end: int) -> None:
    if not 0 <= start <= stop <= end:
        raise ValueError(f"range [{start}, {stop}) does not lie in [0, {end})")
