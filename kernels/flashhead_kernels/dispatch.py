"""Which implementation of the operations serves a device."""

from __future__ import annotations

from types import ModuleType

import torch


def ops_for(device: torch.device | str) -> ModuleType:
    """Return `flashhead_kernels.cpu` for a CPU, `flashhead_kernels.reference` elsewhere.

    Both have the same functions with the same signatures.
    """
    if torch.device(device).type == "cpu":
        from flashhead_kernels import cpu

        return cpu
    from flashhead_kernels import reference

    return reference
