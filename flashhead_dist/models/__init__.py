"""Models by name: the only reader of checkpoints.

`open_model` gives a ModelSource, whose rows are the output embedding's. The body is not loaded, and
only the rows that are asked for are read from the stored file. A Hugging Face folder or hub id is
read by `huggingface`, a .gguf file by `gguf`, "V,D" by `synthetic`; `default_model` is the model
where none is named.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from flashhead_dist.errors import ModelSourceError
from flashhead_dist.models.base import ModelSource
from flashhead_dist.models.cache import cache_root
from flashhead_dist.models.contract import OutputContract, stored_contract
from flashhead_dist.models.default_model import DEFAULT_NAME, default_model_folder
from flashhead_dist.models.huggingface import (
    load_folder_body,
    load_folder_tokenizer,
    open_folder,
)
from flashhead_dist.models.synthetic import SyntheticRows, parse_shape

if TYPE_CHECKING:
    from flashhead_dist.models.hub import HubModel

__all__ = ["ModelSource", "ModelSourceError", "OutputContract", "cache_root", "open_model"]


def open_model(
    model: str | None = None,
    *,
    synthetic: str | None = None,
    dtype: torch.dtype | None = None,
    cache_dir: Path | None = None,
    progress: bool = True,
) -> ModelSource:
    """Open a Hugging Face folder, a .gguf file, a hub id, "V,D" as synthetic, or the default.

    Rows come in `dtype`, by default as stored (bf16 for quantized GGUF and synthetic models).
    Nothing of the body is read. Raises ModelSourceError with a remedy for whatever is wrong with
    the named model.
    """
    cache = cache_root(cache_dir)
    if synthetic is not None:
        if model is not None:
            raise ModelSourceError(
                f"--model {model} and --synthetic {synthetic} exclude each other; give one."
            )
        return _open_synthetic(synthetic, dtype, cache)
    if model is None:
        folder = default_model_folder(cache, progress=progress)
        return _open_folder(folder, DEFAULT_NAME, dtype, cache)
    path = Path(model).expanduser()
    if path.is_dir():
        return _open_folder(path, path.resolve().name, dtype, cache)
    if path.is_file():
        return _open_file(path, dtype, cache)
    return _open_hub(model, dtype, cache)


def _open_folder(
    folder: Path,
    name: str,
    dtype: torch.dtype | None,
    cache: Path,
    hub: HubModel | None = None,
) -> ModelSource:
    path, rows, contract = open_folder(folder, hub.fetch if hub else folder.joinpath, cache)
    find_folder = hub.fetch_all if hub else lambda: folder
    return ModelSource(
        name=name,
        path=path,
        dtype=dtype or rows.dtype,
        tied=contract.tied,
        rows=rows,
        cache=cache,
        find_contract=lambda: contract,
        body_loader=partial(load_folder_body, find_folder),
        tokenizer_loader=partial(load_folder_tokenizer, find_folder),
    )


def _open_file(path: Path, dtype: torch.dtype | None, cache: Path) -> ModelSource:
    if path.suffix != ".gguf":
        raise ModelSourceError(
            f"{path} is a file but no .gguf; name a Hugging Face folder or a .gguf file."
        )
    # The gguf package is imported only where a GGUF file is opened: ranks stay small.
    from flashhead_dist.models.gguf import load_gguf_body, load_gguf_tokenizer, open_gguf

    rows, tied = open_gguf(path)
    return ModelSource(
        name=path.stem,
        path=path,
        dtype=dtype or rows.dtype,
        tied=tied,
        rows=rows,
        cache=cache,
        find_contract=partial(stored_contract, path, cache),
        body_loader=partial(load_gguf_body, path),
        tokenizer_loader=partial(load_gguf_tokenizer, path),
    )


def _open_hub(model: str, dtype: torch.dtype | None, cache: Path) -> ModelSource:
    # huggingface_hub is imported only where the hub is asked: ranks stay small.
    from flashhead_dist.models.hub import HubModel, looks_like_hub_id

    if not looks_like_hub_id(model):
        raise ModelSourceError(
            f"The model {model} does not exist; name a Hugging Face folder, a .gguf file or a hub "
            'id "organisation/name".'
        )
    return _open_folder(Path(model), model, dtype, cache, HubModel(model))


def _open_synthetic(text: str, dtype: torch.dtype | None, cache: Path) -> ModelSource:
    vocab_size, hidden_size = parse_shape(text)
    rows = SyntheticRows(vocab_size, hidden_size)
    return ModelSource(
        name=f"synthetic-{vocab_size}x{hidden_size}",
        synthetic=True,
        dtype=dtype or rows.dtype,
        rows=rows,
        cache=cache,
    )
