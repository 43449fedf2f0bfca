"""From what a user names to a ModelSource."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from flashhead_dist.model_source.base import ModelSource
from flashhead_dist.model_source.cache import cache_root
from flashhead_dist.model_source.default_model import DEFAULT_NAME, default_model_folder
from flashhead_dist.model_source.errors import ModelSourceError
from flashhead_dist.model_source.hf_folder import open_folder
from flashhead_dist.model_source.synthetic import SyntheticRows, parse_shape
from flashhead_dist.model_source.weight_hash import hash_rows


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
    folder: Path, name: str, dtype: torch.dtype | None, cache: Path, repo_id: str | None = None
) -> ModelSource:
    if repo_id is None:
        config, rows, tied = open_folder(folder)
    else:
        from flashhead_dist.model_source.hub import fetch_file

        config, rows, tied = open_folder(folder, partial(fetch_file, repo_id))
        folder = config.path.parent
    return ModelSource(
        name=name,
        path=folder,
        synthetic=False,
        dtype=dtype or rows.dtype,
        tied=tied,
        final_logit_softcap=config.final_logit_softcap,
        rows=rows,
        hash_rows=partial(hash_rows, cache=cache),
        body_loader=partial(_load_folder_body, folder, repo_id),
    )


def _open_file(path: Path, dtype: torch.dtype | None, cache: Path) -> ModelSource:
    if path.suffix != ".gguf":
        raise ModelSourceError(
            f"{path} is a file but no .gguf; name a Hugging Face folder or a .gguf file."
        )
    # The gguf package is imported only where a GGUF file is opened: ranks stay small.
    from flashhead_dist.model_source.gguf_rows import open_gguf

    header, rows, tied = open_gguf(path)
    architecture = header.metadata.get("general.architecture")
    return ModelSource(
        name=path.stem,
        path=path,
        synthetic=False,
        dtype=dtype or rows.dtype,
        tied=tied,
        final_logit_softcap=header.metadata.get(f"{architecture}.final_logit_softcapping"),
        rows=rows,
        hash_rows=partial(hash_rows, cache=cache),
        body_loader=partial(_load_gguf_file, path),
    )


def _open_hub(model: str, dtype: torch.dtype | None, cache: Path) -> ModelSource:
    from flashhead_dist.model_source.hub import looks_like_hub_id

    if not looks_like_hub_id(model):
        raise ModelSourceError(
            f"The model {model} does not exist; name a Hugging Face folder, a .gguf file or a hub "
            'id "organisation/name".'
        )
    return _open_folder(Path(model), model, dtype, cache, repo_id=model)


def _open_synthetic(text: str, dtype: torch.dtype | None, cache: Path) -> ModelSource:
    vocab_size, hidden_size = parse_shape(text)
    rows = SyntheticRows(vocab_size, hidden_size)
    return ModelSource(
        name=f"synthetic-{vocab_size}x{hidden_size}",
        path=None,
        synthetic=True,
        dtype=dtype or rows.dtype,
        tied=False,
        final_logit_softcap=None,
        rows=rows,
        hash_rows=partial(hash_rows, cache=cache),
        body_loader=None,
    )


def _load_folder_body(
    folder: Path, repo_id: str | None, dtype: torch.dtype | None
) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if repo_id is not None:
        from flashhead_dist.model_source.hub import fetch_all

        folder = fetch_all(repo_id)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto")
    except (OSError, ValueError, KeyError) as error:
        raise ModelSourceError(
            f"transformers cannot load the body or tokenizer of {folder} "
            f"({str(error).splitlines()[0]}); fetch the model again, or pass hidden states from "
            "a file."
        ) from error
    return model.eval(), tokenizer


def _load_gguf_file(path: Path, dtype: torch.dtype | None) -> tuple[Any, Any]:
    from flashhead_dist.model_source.gguf_body import load_gguf_body

    return load_gguf_body(path, dtype or torch.bfloat16)
