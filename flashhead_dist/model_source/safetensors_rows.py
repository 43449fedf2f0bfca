"""One two-dimensional tensor of a safetensors file, read by row or column ranges.

The file is read, not mapped: mapped pages of other readers count as resident memory, and a rank's
peak must stay near its own share. Format: https://huggingface.co/docs/safetensors#format
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flashhead_dist.model_source.errors import ModelSourceError

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
        raw = self._read_bytes(start, stop)
        return torch.from_numpy(raw).view(self.dtype).view(stop - start, self.shape[1])

    def read_columns(self, start: int, stop: int) -> torch.Tensor:
        columns = torch.empty(self.shape[0], stop - start, dtype=self.dtype)
        for first, last in self._row_ranges():
            columns[first:last] = self.read_rows(first, last)[:, start:stop]
        return columns

    def stored_chunks(self) -> Iterator[bytes]:
        for first, last in self._row_ranges():
            yield self._read_bytes(first, last).tobytes()

    def fingerprint(self) -> str:
        stat = self._path.stat()
        return f"{self._path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{self._name}"

    def _row_ranges(self) -> Iterator[tuple[int, int]]:
        step = max(1, _CHUNK_BYTES // self._row_bytes)
        for first in range(0, self.shape[0], step):
            yield first, min(first + step, self.shape[0])

    def _read_bytes(self, start: int, stop: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        count = (stop - start) * self._row_bytes
        offset = self._offset + start * self._row_bytes
        raw = np.fromfile(self._path, dtype=np.uint8, count=count, offset=offset)
        if raw.size != count:
            raise ModelSourceError(
                f"{self._path} ends within rows [{start}, {stop}) of {self._name}; "
                "fetch the model again."
            )
        return raw
