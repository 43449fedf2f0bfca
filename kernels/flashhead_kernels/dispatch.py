"""Which implementation of the operations serves a device."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch

_MODULES = {"cpu": "cpu", "cuda": "cuda"}


def ops_for(device: torch.device | str) -> ModuleType:
    """Return `flashhead_kernels.cpu` or `.cuda` for such a device, `.reference` for any other.

    All have the same functions with the same signatures.

    Raises:
        ImportError: Triton is missing where CUDA needs it.
    """
    return load_module(_MODULES.get(torch.device(device).type, "reference"))


@functools.cache
def load_module(name: str) -> ModuleType:
    """`flashhead_kernels.<name>`, with a remedy where Triton is missing."""
    try:
        return importlib.import_module(f"flashhead_kernels.{name}")
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise ImportError(
            'CUDA needs Triton: pip install -e ".[gpu]", or use --device cpu'
        ) from error


_SAMPLING_MODULES = {"cpu": "cpu_sampling", "cuda": "cuda_sampling"}


def sampling_ops_for(device: torch.device | str) -> ModuleType:
    """`cpu_sampling` or `cuda_sampling` for such a device, `sampling` (plain torch) for any other.

    All have the same functions with the same signatures.

    Raises:
        ImportError: Triton is missing where CUDA needs it.
    """
    return load_module(_SAMPLING_MODULES.get(torch.device(device).type, "sampling"))
