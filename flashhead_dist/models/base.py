"""A model as this project sees it: rows of an output embedding, and a body on demand.

Letters: V vocabulary, D hidden size.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashhead_dist.errors import ModelSourceError
from flashhead_dist.models.cache import cached_hash
from flashhead_dist.models.contract import OutputContract


class RowStore(ABC):
    """The stored output embedding, read in chunks of rows.

    A subclass sets `shape`, (V, D); `dtype`, in which rows are read by default; and `chunk_rows`,
    how many rows one read takes.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    chunk_rows: int

    @abstractmethod
    def read_chunk(self, start: int, stop: int) -> Tensor:
        """Rows [stop - start, D] that lie in one chunk; valid until the next call."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Changes whenever the stored bytes may have: a key for what is derived from them."""

    def ranges(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """The parts of [start, stop) that lie in one chunk each, in order."""
        while start < stop:
            end = min(stop, (start // self.chunk_rows + 1) * self.chunk_rows)
            yield start, end
            start = end

    def read_rows(self, start: int, stop: int) -> Tensor:
        """Rows [stop - start, D]."""
        rows = torch.empty(stop - start, self.shape[1], dtype=self.dtype)
        for first, last in self.ranges(start, stop):
            rows[first - start : last - start] = self.read_chunk(first, last)
        return rows

    def read_columns(self, start: int, stop: int) -> Tensor:
        """Columns [V, stop - start], holding little more than the result at any time."""
        columns = torch.empty(self.shape[0], stop - start, dtype=self.dtype)
        for first, last in self.ranges(0, self.shape[0]):
            columns[first:last] = self.read_chunk(first, last)[:, start:stop]
        return columns

    def stored_chunks(self) -> Iterator[bytes]:
        """The stored bytes in order, in chunks of bounded size."""
        for first, last in self.ranges(0, self.shape[0]):
            yield self.read_chunk(first, last).contiguous().view(torch.uint8).numpy().tobytes()


@dataclass(frozen=True)
class ModelSource:
    """Where output-embedding rows come from.

    `dtype` is what `read_rows` and `read_columns` return. `tied` says whether the output embedding
    is the input embedding as well. `path` is the folder or file, None for a synthetic model.
    `cache` keeps the weight hash; None for none. `find_contract` may take seconds the first time.
    """

    name: str
    dtype: torch.dtype
    rows: RowStore = field(repr=False)
    cache: Path | None = field(default=None, repr=False)
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
        return cached_hash(self.rows.fingerprint(), self.rows.stored_chunks, self.cache)

    def read_rows(self, start: int, stop: int) -> Tensor:
        """Rows [stop - start, D] of the output embedding, on the CPU; only these are read.

        Raises ValueError unless 0 <= start <= stop <= V, ModelSourceError where the file is
        shorter than its header says.
        """
        _check_range(start, stop, self.vocab_size)
        return self.rows.read_rows(start, stop).to(self.dtype)

    def read_columns(self, start: int, stop: int) -> Tensor:
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


class _SubsetRows(RowStore):
    """The rows `token_ids` int64 `[n]`, ascending, of another store: row i is that token's."""

    def __init__(self, rows: RowStore, token_ids: Tensor) -> None:
        self._rows, self._token_ids = rows, token_ids
        self.shape, self.dtype = (len(token_ids), rows.shape[1]), rows.dtype
        self.chunk_rows = len(token_ids)

    def read_chunk(self, start: int, stop: int) -> Tensor:
        wanted = self._token_ids[start:stop]
        found = torch.empty(len(wanted), self.shape[1], dtype=self.dtype)
        for first, last in self._rows.ranges(0, self._rows.shape[0]):
            inside = (wanted >= first) & (wanted < last)
            if bool(inside.any()):
                found[inside] = self._rows.read_chunk(first, last)[wanted[inside] - first]
        return found

    def stored_chunks(self) -> Iterator[bytes]:
        yield from self._rows.stored_chunks()
        yield self._token_ids.numpy().tobytes()

    def fingerprint(self) -> str:
        ids = hashlib.sha256(self._token_ids.numpy().tobytes()).hexdigest()
        return f"{self._rows.fingerprint()}|subset|{ids}"


def reduce_vocabulary(source: ModelSource, token_ids: Tensor) -> ModelSource:
    """A source whose token i is token `token_ids[i]` of `source`; without body and tokenizer.

    token_ids: int64 `[n]`, ascending, each once.

    Raises:
        ModelSourceError: no ids, or ids that are not so, or outside the vocabulary.
    """
    ids = token_ids.to(torch.int64)
    ascending = bool((ids[1:] > ids[:-1]).all())
    if not len(ids) or not ascending or int(ids[0]) < 0 or int(ids[-1]) >= source.vocab_size:
        raise ModelSourceError(
            f"{len(ids)} token ids make no reduced vocabulary of {source.name}: give ids between 0 "
            f"and {source.vocab_size - 1}, ascending, each once."
        )
    return replace(
        source,
        name=f"{source.name}-of-{len(ids)}",
        rows=_SubsetRows(source.rows, ids),
        body_loader=None,
        tokenizer_loader=None,
    )
