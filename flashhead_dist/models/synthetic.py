"""A made-up output embedding, for sizes that no model at hand has. Never mistaken for a real one.

Rows are additive codes: a token's cluster number, written in base 64, picks one vector from each
codebook, and noise of its own is added, so that rows form clusters of clusters scattered over the
token ids. Cluster sizes follow a power law. Row r depends on (V, D, r) alone, whichever range is
read: randomness comes in blocks of rows, each from a generator keyed by its number.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashhead_dist.errors import ModelSourceError
from flashhead_dist.models.base import RowStore

_VERSION = 1
_BLOCK_ROWS = 256
_CODEBOOK_SIZE = 64
_CODEBOOK_WEIGHTS = (0.55, 0.5, 0.35)
_NOISE_WEIGHT = 0.6

Array = np.ndarray[Any, np.dtype[Any]]


def parse_shape(text: str) -> tuple[int, int]:
    """(V, D) from "V,D".

    Raises ModelSourceError unless both are positive integers.
    """
    match = re.fullmatch(r"\s*(\d+)\s*,\s*(\d+)\s*", text)
    if match is None or min(shape := (int(match[1]), int(match[2]))) < 1:
        raise ModelSourceError(
            f"--synthetic {text} is not V,D; give two positive integers such as 32000,1024."
        )
    return shape


class SyntheticRows(RowStore):
    """Rows that are made when they are read, a block at a time."""

    dtype, chunk_rows = torch.bfloat16, _BLOCK_ROWS

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        self.shape = (vocab_size, hidden_size)
        self._num_clusters = max(1, vocab_size // 32)
        draw = _generator(vocab_size, hidden_size, 0)
        self._codebooks = [
            weight * draw.standard_normal((_CODEBOOK_SIZE, hidden_size), dtype=np.float32)
            for weight in _CODEBOOK_WEIGHTS
        ]

    def stored_chunks(self) -> Iterator[bytes]:
        # Nothing is stored: what fixes every row stands for the rows.
        yield self.fingerprint().encode()

    def fingerprint(self) -> str:
        return f"synthetic|{_VERSION}|{self.shape[0]}|{self.shape[1]}"

    def read_chunk(self, start: int, stop: int) -> Tensor:
        block = start // _BLOCK_ROWS
        draw = _generator(*self.shape, block + 1)
        uniform = draw.random(_BLOCK_ROWS)
        noise = draw.standard_normal((_BLOCK_ROWS, self.shape[1]), dtype=np.float32)
        # Squaring a uniform draw gives low cluster numbers more tokens.
        clusters = (uniform**2 * self._num_clusters).astype(np.int64)
        rows: Array = _NOISE_WEIGHT * noise
        for codebook in self._codebooks:
            rows += codebook[clusters % _CODEBOOK_SIZE]
            clusters //= _CODEBOOK_SIZE
        rows /= np.sqrt(np.float32(self.shape[1]))
        offset = block * _BLOCK_ROWS
        return torch.from_numpy(rows[start - offset : stop - offset]).to(self.dtype)


def _generator(vocab_size: int, hidden_size: int, stream: int) -> np.random.Generator:
    text = f"{_VERSION},{vocab_size},{hidden_size},{stream}"
    key = int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")
    return np.random.Generator(np.random.Philox(key=key))
