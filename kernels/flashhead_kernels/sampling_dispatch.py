"""Which implementation of the sampling operations serves a device."""

from __future__ import annotations

from types import ModuleType

import torch

from flashhead_kernels import cpu_sampling, sampling


def sampling_ops_for(device: torch.device | str) -> ModuleType:
    """`cpu_sampling` for a CPU, `sampling` (plain torch) for any other device; same functions."""
    return cpu_sampling if torch.device(device).type == "cpu" else sampling
