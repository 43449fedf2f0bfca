"""Loading whole transformers models, without the bars that transformers draws by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from flashhead_dist.models.compressed import settle_compressed
from flashhead_dist.models.errors import ModelSourceError

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


def load_folder_body(find_folder: Callable[[], Path], dtype: torch.dtype | None) -> tuple[Any, Any]:
    """Model (eval mode, CPU, `dtype` or as stored) and tokenizer of the folder that is found.

    Four-bit layers that compressed-tensors wrote stay packed: see `settle_compressed`.
    Raises ModelSourceError where transformers cannot load either.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = find_folder()
    try:
        with _no_bars():
            tokenizer = AutoTokenizer.from_pretrained(folder)
            model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto")
        settle_compressed(model)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _unloadable(folder, error) from error
    return model.eval(), tokenizer


def load_gguf_body(path: Path, dtype: torch.dtype | None) -> tuple[Any, Any]:
    """Model (eval mode, CPU, dense weights in `dtype` or bf16) and tokenizer of a GGUF file.

    Raises ModelSourceError where transformers cannot load either.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    try:
        with _no_bars():
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
            model: Any = AutoModelForCausalLM.from_pretrained(
                path.parent,
                gguf_file=path.name,
                dtype=dtype or torch.bfloat16,
                quantization_config=GgufConfig(gguf_file=path.name, dequantize=True),
            )
    except (OSError, ValueError, KeyError) as error:
        raise _unloadable(path, error) from error
    return model.eval(), tokenizer


def load_folder_tokenizer(find_folder: Callable[[], Path]) -> Any:
    """The tokenizer of the folder that is found; None where it has none.

    Raises ModelSourceError where transformers cannot load it.
    """
    from transformers import AutoTokenizer

    folder = find_folder()
    if not any((folder / name).exists() for name in _TOKENIZER_FILES):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise _unloadable(folder, error) from error


def load_gguf_tokenizer(path: Path) -> Any:
    """The tokenizer of a GGUF file; raises ModelSourceError where transformers cannot load it."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except (OSError, ValueError, KeyError) as error:
        raise _unloadable(path, error) from error


def _unloadable(path: Path, error: Exception) -> ModelSourceError:
    reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
    return ModelSourceError(
        f"transformers cannot load the body or tokenizer of {path} ({reason}); fetch the model "
        "again, or give hidden states from a file."
    )


@contextmanager
def _no_bars() -> Iterator[None]:
    from transformers import utils

    logging: Any = utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
