"""A Hugging Face folder: the rows of its output embedding, its body and its tokenizer.

Which stored tensor is the output embedding follows from the model's own class (`contract`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flashhead_dist.errors import ModelSourceError
from flashhead_dist.models.base import RowStore
from flashhead_dist.models.cache import file_fingerprint
from flashhead_dist.models.contract import OutputContract, stored_contract
from flashhead_dist.models.quantized import settle_compressed

_SINGLE_NAME = "model.safetensors"
_INDEX_NAME = "model.safetensors.index.json"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CHUNK_BYTES = 16 << 20
"""Read between two opens of a file: pages mapped from it count as this process's memory."""


class SafetensorsRows(RowStore):
    """Tensor `name` [V, D] of one safetensors file."""

    def __init__(self, path: Path, name: str) -> None:
        self._path, self._name = path, name
        with open_safetensors(path) as file:
            stored = file.get_slice(name)
            shape, dtype = stored.get_shape(), stored.get_dtype()
        if len(shape) != 2 or dtype not in _DTYPES:
            raise ModelSourceError(
                f"{name} in {path} is {dtype} {shape}, but an output embedding has two dimensions "
                "in F32, F16 or BF16; use an unquantized checkpoint."
            )
        self.dtype = _DTYPES[dtype]
        self.shape = (shape[0], shape[1])
        self.chunk_rows = max(1, _CHUNK_BYTES // (shape[1] * self.dtype.itemsize))

    def read_chunk(self, start: int, stop: int) -> Tensor:
        with open_safetensors(self._path) as file:
            rows: Tensor = file.get_slice(self._name)[start:stop]
            return rows

    def fingerprint(self) -> str:
        return file_fingerprint(self._path, self._name)


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """`safe_open(path)`; raises ModelSourceError where the file is missing, cut or damaged."""
    try:
        with safe_open(path, "pt") as file:
            yield file
    except FileNotFoundError as error:
        raise ModelSourceError(
            f"The weight file {path} is missing; fetch the model again, all of its files."
        ) from error
    except (OSError, SafetensorError) as error:
        raise ModelSourceError(
            f"{path} is truncated or no safetensors file ({error}); fetch the model again."
        ) from error


def open_folder(
    folder: Path, locate: Callable[[str], Path], cache: Path
) -> tuple[Path, SafetensorsRows, OutputContract]:
    """The folder that holds the configuration, the output embedding's rows, and the contract.

    `locate(file_name)` gives the path of a file of the folder and fetches it where it must.
    Raises ModelSourceError for anything missing, truncated or inconsistent, and for a model whose
    output a contract cannot express.
    """
    config = locate("config.json")
    if not config.exists():
        raise ModelSourceError(
            f"{folder} has no config.json; name a Hugging Face model folder or a .gguf file."
        )
    contract = stored_contract(config, cache)
    files = _tensor_files(folder, locate)
    name = _stored_name(contract, set(files), folder)
    path = locate(files[name])
    with open_safetensors(path) as file:
        if name not in file.keys():  # noqa: SIM118 (a handle is no dict)
            raise ModelSourceError(
                f"{_INDEX_NAME} in {folder} places {name} in {files[name]}, which does not hold "
                "it; fetch the model again."
            )
    rows = SafetensorsRows(path, name)
    if contract.vocab_size != rows.shape[0]:
        raise ModelSourceError(
            f"{config} says vocab_size {contract.vocab_size}, but {name} has {rows.shape[0]} "
            "rows; fetch the model again."
        )
    return config.parent, rows, contract


def _stored_name(contract: OutputContract, stored: set[str], folder: Path) -> str:
    """The stored name of the output embedding: a checkpoint may put its modules elsewhere."""
    for name in contract.weight_names:
        own = ".".join(name.split(".")[-2:])
        found = [key for key in stored if key == own or key.endswith(f".{own}")]
        if found:
            return name if name in stored else min(found, key=len)
    raise ModelSourceError(
        f"{folder} stores no output embedding under {' or '.join(contract.weight_names)}; fetch "
        "the model again, all of its files."
    )


def _tensor_files(folder: Path, locate: Callable[[str], Path]) -> dict[str, str]:
    """Map of tensor name to file name; the single file comes first, as in transformers."""
    single = locate(_SINGLE_NAME)
    if single.exists():
        with open_safetensors(single) as file:
            return dict.fromkeys(file.keys(), _SINGLE_NAME)
    index = locate(_INDEX_NAME)
    if not index.exists():
        raise ModelSourceError(
            f"{folder} holds neither {_SINGLE_NAME} nor {_INDEX_NAME}; fetch the model again, or "
            "convert its weights to safetensors with save_pretrained."
        )
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {str(name): str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelSourceError(
            f"{index} is no readable shard index; fetch the model again."
        ) from error


def load_folder_body(find_folder: Callable[[], Path], dtype: torch.dtype | None) -> tuple[Any, Any]:
    """Model (eval mode, CPU, `dtype` or as stored) and tokenizer of the folder that is found.

    Four-bit layers that compressed-tensors wrote stay packed: see `settle_compressed`.
    Raises ModelSourceError where transformers cannot load either.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = find_folder()
    with loading(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto")
        settle_compressed(model)
    return model.eval(), tokenizer


def load_folder_tokenizer(find_folder: Callable[[], Path]) -> Any:
    """The tokenizer of the folder that is found; None where it has none.

    Raises ModelSourceError where transformers cannot load it.
    """
    from transformers import AutoTokenizer

    folder = find_folder()
    if not any((folder / name).exists() for name in _TOKENIZER_FILES):
        return None
    with loading(folder):
        return AutoTokenizer.from_pretrained(folder)


@contextmanager
def loading(path: Path) -> Iterator[None]:
    """Load with transformers: without its progress bars, its errors as ModelSourceError."""
    from transformers import utils

    logging: Any = utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ModelSourceError(
            f"transformers cannot load the body or tokenizer of {path} ({reason}); fetch the model "
            "again, or give hidden states from a file."
        ) from error
    finally:
        if shown:
            logging.enable_progress_bar()
