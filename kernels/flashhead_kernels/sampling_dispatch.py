"""Which implementation of the sampling operations serves a device."""

from __future__ import annotations

from types import ModuleType

import torch

from flashhead_kernels.dispatch import load_module

_MODULES = {"cpu": "cpu_sampling", "cuda": "cuda_sampling"}


def sampling_ops_for(device: torch.device | str) -> ModuleType:
    """`cpu_sampling` or `cuda_sampling` for such a device, `sampling` (plain torch) for any other.

    All have the same functions with the same signatures.

    Raises:
        ImportError: Triton is missing where CUDA needs it.
    """
    return load_module(_MODULES.get(torch.device(device).type, "sampling"))
