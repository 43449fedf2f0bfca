"""A GGUF file: the rows of its output embedding, its body and its tokenizer.

The `gguf` package parses the header and dequantizes. Rows are read, not mapped: pages mapped from
a file count as a process's memory. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, ReaderTensor
from gguf.quants import dequantize
from torch import Tensor

from flashhead_dist.errors import ModelSourceError
from flashhead_dist.models.base import RowStore
from flashhead_dist.models.cache import file_fingerprint
from flashhead_dist.models.huggingface import loading

_PLAIN = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
}
_CHUNK_BYTES = 4 << 20


class _HeaderReader(GGUFReader):
    """Skips arrays: GGUFReader makes five objects of each tokenizer string, a gigabyte in all."""

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        if raw_type != GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        kind, count = int(self._get(orig_offs, np.uint32)[0]), self._get(orig_offs + 4, np.uint64)
        offset = orig_offs + 12
        if kind in self.gguf_scalar_to_np:
            item_bytes = np.dtype(self.gguf_scalar_to_np[GGUFValueType(kind)]).itemsize
            offset += int(count[0]) * item_bytes
        else:
            data = memoryview(self.data)  # type: ignore[arg-type]
            for _ in range(int(count[0])):
                if kind == GGUFValueType.STRING:
                    offset += 8 + int.from_bytes(data[offset : offset + 8], "little")
                else:
                    offset += self._get_field_parts(offset, kind)[0]
        return offset - orig_offs, [], [], [GGUFValueType.ARRAY]


class GgufRows(RowStore):
    """A tensor [V, D]; bf16 where the file holds quantized blocks or bf16."""

    def __init__(self, path: Path, tensor: ReaderTensor) -> None:
        self._path, self._name, self._kind = path, tensor.name, tensor.tensor_type
        if len(tensor.shape) != 2:
            raise ModelSourceError(
                f"{tensor.name} in {path} has {len(tensor.shape)} dimensions, not 2; use another "
                "GGUF file of this model."
            )
        # GGUF counts dimensions from the innermost.
        self.shape = (int(tensor.shape[1]), int(tensor.shape[0]))
        self.dtype = _PLAIN.get(tensor.tensor_type, torch.bfloat16)
        self._row_bytes = int(tensor.n_bytes) // self.shape[0]
        self._offset = int(tensor.data_offset)
        self.chunk_rows = max(1, _CHUNK_BYTES // self._row_bytes)

    def read_chunk(self, start: int, stop: int) -> Tensor:
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

    def stored_chunks(self) -> Iterator[bytes]:
        for first, last in self.ranges(0, self.shape[0]):
            yield self._stored(first, last).tobytes()

    def fingerprint(self) -> str:
        return file_fingerprint(self._path, self._name)

    def _stored(self, start: int, stop: int) -> Any:
        """The stored bytes of rows: uint8 `[stop - start, row bytes]`."""
        offset, count = self._offset + start * self._row_bytes, (stop - start) * self._row_bytes
        stored = np.fromfile(self._path, np.uint8, count, offset=offset)
        if stored.size != count:
            raise ModelSourceError(f"{self._path} is truncated; fetch the model again.")
        return stored.reshape(stop - start, self._row_bytes)


def open_gguf(path: Path) -> tuple[GgufRows, bool]:
    """Row store over `output.weight` (else `token_embd.weight`), and whether it is tied.

    Raises ModelSourceError where there is neither, or where the file is damaged.
    """
    try:
        tensors = {tensor.name: tensor for tensor in _HeaderReader(path).tensors}
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise ModelSourceError(
            f"{path} is truncated or no GGUF file ({error}); fetch the model again."
        ) from error
    for name, tied in (("output.weight", False), ("token_embd.weight", True)):
        if name in tensors:
            return GgufRows(path, tensors[name]), tied
    raise ModelSourceError(
        f"{path} has no output.weight and no token_embd.weight; use the GGUF file of a causal "
        "language model."
    )


def load_gguf_body(path: Path, dtype: torch.dtype | None) -> tuple[Any, Any]:
    """Model (eval mode, CPU, dense weights in `dtype` or bf16) and tokenizer of a GGUF file.

    Raises ModelSourceError where transformers cannot load either.
    """
    from transformers import AutoModelForCausalLM, GgufConfig

    tokenizer = load_gguf_tokenizer(path)
    with loading(path):
        model: Any = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            dtype=dtype or torch.bfloat16,
            quantization_config=GgufConfig(gguf_file=path.name, dequantize=True),
        )
    return model.eval(), tokenizer


def load_gguf_tokenizer(path: Path) -> Any:
    """The tokenizer of a GGUF file; raises ModelSourceError where transformers cannot load it."""
    from transformers import AutoTokenizer

    with loading(path):
        return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def convert_gguf(path: str | Path, folder: str | Path) -> None:
    """Write model (bf16) and tokenizer of a GGUF file as a Hugging Face folder."""
    model, tokenizer = load_gguf_body(Path(path), torch.bfloat16)
    # transformers keeps the model marked as quantized, and then refuses to save dense weights.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
