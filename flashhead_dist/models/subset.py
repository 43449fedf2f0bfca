"""Some tokens of a model, as a model of its own: the rows of a reduced vocabulary."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from flashhead_dist.errors import ModelSourceError
from flashhead_dist.models.base import ModelSource, RowStore

_READ_ROWS = 1 << 14


class SubsetRows:
    """RowStore of the rows `token_ids` of another: row i is that token's."""

    def __init__(self, rows: RowStore, token_ids: Tensor) -> None:
        """token_ids: int64 `[n]`."""
        self._rows, self._token_ids = rows, token_ids
        self.shape = (len(token_ids), rows.shape[1])
        self.dtype = rows.dtype

    def read_rows(self, start: int, stop: int) -> Tensor:
        wanted = self._token_ids[start:stop]
        found = torch.empty(len(wanted), self.shape[1], dtype=self.dtype)
        for first in range(0, self._rows.shape[0], _READ_ROWS):
            last = min(first + _READ_ROWS, self._rows.shape[0])
            inside = (wanted >= first) & (wanted < last)
            if bool(inside.any()):
                found[inside] = self._rows.read_rows(first, last)[wanted[inside] - first]
        return found

    def read_columns(self, start: int, stop: int) -> Tensor:
        return self._rows.read_columns(start, stop)[self._token_ids]

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
        rows=SubsetRows(source.rows, ids),
        body_loader=None,
        tokenizer_loader=None,
    )
