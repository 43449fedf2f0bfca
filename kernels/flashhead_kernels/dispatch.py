"""Which implementation of the operations serves a device."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch


def ops_for(device: torch.device | str) -> ModuleType:
    """Return `flashhead_kernels.cpu` for a CPU, `flashhead_kernels.reference` elsewhere.

    Both have the same functions with the same signatures.
    """
    return _module("cpu" if torch.device(device).type == "cpu" else "reference")


@functools.cache
def _module(name: str) -> ModuleType:
    return importlib.import_module(f"flashhead_kernels.{name}")
