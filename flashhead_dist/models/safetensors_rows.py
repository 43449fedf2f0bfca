"""One two-dimensional tensor of a safetensors file, read by row or column ranges.

Format: https://huggingface.co/docs/safetensors#format
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flashhead_dist.models.errors import ModelSourceError
from flashhead_dist.models.file_slices import (
    Bytes,
    file_fingerprint,
    read_slice,
    row_ranges,
)

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_MAX_HEADER_BYTES = 100_000_000
_CHUNK_BYTES = 16 << 20


@dataclass(frozen=True)
class SafetensorsHeader:
    """Tensor entries of a file (`dtype`, `shape`, `data_offsets`) and where their data starts."""

    path: Path
    entries: dict[str, dict[str, Any]]
    data_start: int


def read_header(path: Path) -> SafetensorsHeader:
    """Parse the header alone.

    Raises ModelSourceError where the file is missing, no safetensors, or shorter than its header
    says.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size, _MAX_HEADER_BYTES):
                raise ValueError("header longer than the file")
            entries = json.loads(file.read(length))
        entries.pop("__metadata__", None)
        needed = 8 + length + max((e["data_offsets"][1] for e in entries.values()), default=0)
    except FileNotFoundError as error:
        raise ModelSourceError(
            f"The weight file {path} is missing; fetch the model again, all of its files."
        ) from error
    except (OSError, struct.error, ValueError, AttributeError, KeyError, TypeError) as error:
        raise ModelSourceError(
            f"{path} is no readable safetensors file ({error}); fetch the model again."
        ) from error
    if size < needed:
        raise ModelSourceError(
            f"{path} is truncated: {size} bytes of {needed}; fetch the model again."
        )
    return SafetensorsHeader(path, entries, 8 + length)


class SafetensorsRows:
    """RowStore over tensor `name` [V, D] of one safetensors file."""

    def __init__(self, header: SafetensorsHeader, name: str) -> None:
        entry = header.entries[name]
        if len(entry["shape"]) != 2 or entry["dtype"] not in _DTYPES:
            raise ModelSourceError(
                f"{name} in {header.path} is {entry['dtype']} {entry['shape']}, but an output "
                "embedding has two dimensions in F32, F16 or BF16; use an unquantized checkpoint."
            )
        self._path = header.path
        self._name = name
        self.dtype = _DTYPES[entry["dtype"]]
        self.shape: tuple[int, int] = (int(entry["shape"][0]), int(entry["shape"][1]))
        self._row_bytes = self.shape[1] * self.dtype.itemsize
        self._offset = header.data_start + int(entry["data_offsets"][0])

    def read_rows(self, start: int, stop: int) -> torch.Tensor:
        return torch.from_numpy(self._stored(start, stop)).view(self.dtype)

    def read_columns(self, start: int, stop: int) -> torch.Tensor:
        columns = torch.empty(self.shape[0], stop - start, dtype=self.dtype)
        for first, last in row_ranges(0, self.shape[0], self._row_bytes, _CHUNK_BYTES):
            columns[first:last] = self.read_rows(first, last)[:, start:stop]
        return columns

    def stored_chunks(self) -> Iterator[bytes]:
        for first, last in row_ranges(0, self.shape[0], self._row_bytes, _CHUNK_BYTES):
            yield self._stored(first, last).tobytes()

    def fingerprint(self) -> str:
        return file_fingerprint(self._path, self._name)

    def _stored(self, start: int, stop: int) -> Bytes:
        offset = self._offset + start * self._row_bytes
        raw = read_slice(self._path, offset, (stop - start) * self._row_bytes)
        return raw.reshape(stop - start, self._row_bytes)
