"""The output embedding of a Hugging Face folder: one or many safetensors files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from flashhead_dist.models.errors import ModelSourceError
from flashhead_dist.models.hf_config import (
    HeadConfig,
    choose_output_embedding,
    read_config,
)
from flashhead_dist.models.safetensors_rows import SafetensorsRows, read_header

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"


def open_folder(
    folder: Path, locate: Callable[[str], Path]
) -> tuple[HeadConfig, SafetensorsRows, bool]:
    """Configuration, row store and whether the embeddings are tied.

    `locate(file_name)` gives the path of a file of the folder, fetching it where it must.
    Raises ModelSourceError for anything missing, truncated, inconsistent or without a linear head.
    """
    config = read_config(locate("config.json"))
    files = _tensor_files(folder, locate)
    name, tied = choose_output_embedding(config, set(files))
    header = read_header(locate(files[name]))
    if name not in header.entries:
        raise ModelSourceError(
            f"{INDEX_NAME} in {folder} places {name} in {files[name]}, which does not hold it; "
            "fetch the model again."
        )
    rows = SafetensorsRows(header, name)
    if config.vocab_size is not None and config.vocab_size != rows.shape[0]:
        raise ModelSourceError(
            f"{config.path} says vocab_size {config.vocab_size}, but {name} has {rows.shape[0]} "
            "rows; fetch the model again."
        )
    return config, rows, tied


def _tensor_files(folder: Path, locate: Callable[[str], Path]) -> dict[str, str]:
    """Map of tensor name to file name; the single file comes first, as in transformers."""
    single = locate(SINGLE_NAME)
    if single.exists():
        return dict.fromkeys(read_header(single).entries, SINGLE_NAME)
    index = locate(INDEX_NAME)
    if index.exists():
        return _read_index(index)
    raise ModelSourceError(
        f"{folder} holds neither {SINGLE_NAME} nor {INDEX_NAME}; fetch the model again, or "
        "convert its weights to safetensors with save_pretrained."
    )


def _read_index(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {str(name): str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelSourceError(
            f"{index} is no readable shard index; fetch the model again."
        ) from error
