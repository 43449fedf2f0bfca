"""The output embedding of a GGUF file, dequantized by the slice.

`gguf.GGUFReader` parses every tokenizer string into Python objects (ten seconds and hundreds of
megabytes for a vocabulary of 262,144), so the header is walked here, skipping the strings; block
formats and dequantization are the `gguf` package's. Format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize

from flashhead_dist.models.errors import ModelSourceError
from flashhead_dist.models.file_slices import (
    Bytes,
    file_fingerprint,
    read_slice,
    row_ranges,
)

_SCALARS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}
_PLAIN = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
}
_CHUNK_BYTES = 4 << 20


@dataclass(frozen=True)
class GgufTensor:
    """One entry of the tensor table; `shape` is outermost first, `offset` from the file's start."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int


@dataclass(frozen=True)
class GgufHeader:
    """Scalar and string metadata (arrays are skipped) and the tensor table."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


def read_gguf_header(path: Path) -> GgufHeader:
    """Walk the header.

    Raises ModelSourceError where the file is no GGUF of version 2 or 3, or ends too early.
    """
    try:
        with path.open("rb") as file:
            magic, version = _unpack(file, "<4sI")
            if magic != b"GGUF" or version not in (2, 3):
                raise ValueError(f"magic {magic!r}, version {version}")
            num_tensors, num_fields = _unpack(file, "<QQ")
            metadata = {_string(file): _value(file) for _ in range(num_fields)}
            table = [_tensor_entry(file) for _ in range(num_tensors)]
            alignment = int(metadata.get("general.alignment", 32))
            start = -(-file.tell() // alignment) * alignment
    except (OSError, struct.error, ValueError, UnicodeDecodeError, MemoryError) as error:
        raise ModelSourceError(
            f"{path} is no readable GGUF file ({error}); fetch the model again."
        ) from error
    tensors = {name: GgufTensor(shape, kind, start + at) for name, shape, kind, at in table}
    return GgufHeader(path, metadata, tensors)


class GgufRows:
    """RowStore over tensor `name` [V, D]; bf16 where the file holds quantized blocks or bf16."""

    def __init__(self, header: GgufHeader, name: str) -> None:
        tensor = header.tensors[name]
        if len(tensor.shape) != 2:
            raise ModelSourceError(
                f"{name} in {header.path} has {len(tensor.shape)} dimensions, not 2; "
                "use another GGUF file of this model."
            )
        self._path = header.path
        self._name = name
        self._kind = tensor.kind
        self.shape: tuple[int, int] = (tensor.shape[0], tensor.shape[1])
        self.dtype = _PLAIN.get(tensor.kind, torch.bfloat16)
        block, block_bytes = GGML_QUANT_SIZES[tensor.kind]
        self._row_bytes = self.shape[1] // block * block_bytes
        self._offset = tensor.offset
        needed = self._offset + self.shape[0] * self._row_bytes
        if (size := header.path.stat().st_size) < needed:
            raise ModelSourceError(
                f"{header.path} is truncated: {size} bytes, but {name} ends at {needed}; "
                "fetch the model again."
            )

    def read_rows(self, start: int, stop: int) -> torch.Tensor:
        rows = torch.empty(stop - start, self.shape[1], dtype=self.dtype)
        for first, last in row_ranges(start, stop, self._row_bytes, _CHUNK_BYTES):
            rows[first - start : last - start] = self._dequantized(first, last)
        return rows

    def read_columns(self, start: int, stop: int) -> torch.Tensor:
        columns = torch.empty(self.shape[0], stop - start, dtype=self.dtype)
        for first, last in row_ranges(0, self.shape[0], self._row_bytes, _CHUNK_BYTES):
            columns[first:last] = self._dequantized(first, last)[:, start:stop]
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

    def _dequantized(self, start: int, stop: int) -> torch.Tensor:
        stored = self._stored(start, stop)
        if self._kind in _PLAIN:
            return torch.from_numpy(stored).view(self.dtype)
        try:
            return torch.from_numpy(dequantize(stored, self._kind))
        except NotImplementedError as error:
            raise ModelSourceError(
                f"{self._name} in {self._path} is stored as {self._kind.name}, which the gguf "
                "package cannot dequantize; use a file with another quantization."
            ) from error


def open_gguf(path: Path) -> tuple[GgufHeader, GgufRows, bool]:
    """Header, row store over `output.weight` (else `token_embd.weight`), and whether it is tied.

    Raises ModelSourceError where there is neither, or where the file is damaged.
    """
    header = read_gguf_header(path)
    for name, tied in (("output.weight", False), ("token_embd.weight", True)):
        if name in header.tensors:
            return header, GgufRows(header, name), tied
    raise ModelSourceError(
        f"{path} has no output.weight and no token_embd.weight; use the GGUF file of a causal "
        "language model."
    )


def _unpack(file: BinaryIO, layout: str) -> tuple[Any, ...]:
    return struct.unpack(layout, file.read(struct.calcsize(layout)))


def _string(file: BinaryIO) -> str:
    (length,) = _unpack(file, "<Q")
    return file.read(length).decode("utf-8")


def _value(file: BinaryIO) -> Any:
    return _typed_value(file, GGUFValueType(_unpack(file, "<I")[0]))


def _typed_value(file: BinaryIO, kind: GGUFValueType) -> Any:
    if kind is GGUFValueType.STRING:
        return _string(file)
    if kind is GGUFValueType.ARRAY:
        _skip_array(file)
        return None
    return _unpack(file, "<" + _SCALARS[kind])[0]


def _skip_array(file: BinaryIO) -> None:
    kind_value, count = _unpack(file, "<IQ")
    kind = GGUFValueType(kind_value)
    if kind in _SCALARS:
        file.seek(count * struct.calcsize(_SCALARS[kind]), 1)
    elif kind is GGUFValueType.STRING:
        for _ in range(count):
            file.seek(_unpack(file, "<Q")[0], 1)
    else:
        for _ in range(count):
            _skip_array(file)


def _tensor_entry(file: BinaryIO) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
    name = _string(file)
    (num_dims,) = _unpack(file, "<I")
    shape = tuple(int(n) for n in reversed(_unpack(file, f"<{num_dims}Q")))
    kind, offset = _unpack(file, "<IQ")
    return name, shape, GGMLQuantizationType(kind), offset
