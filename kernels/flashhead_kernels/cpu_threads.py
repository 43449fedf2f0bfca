"""How many threads this process computes with: torch, and the kernels, which follow torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def compute_threads(number: int) -> Iterator[None]:
    """Compute with `number` threads inside the block, and with as many as before after it."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, number))
    try:
        yield
    finally:
        torch.set_num_threads(before)
