"""Captured work on a simulated GPU: a graph reads nothing that was freed."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import pytest
import torch

from flashhead_dist.bench.timer import CapturedWork

if TYPE_CHECKING:
    from simulated_cuda import SimulatedCuda


def _captured(batch: torch.Tensor) -> CapturedWork:
    """Work that reads the answer of an exchange, which this function alone knows of."""
    answer = torch.full((4,), 2.0, device="cuda")
    return CapturedWork(lambda states: states + answer, batch)


def test_captured_work_keeps_what_its_graph_reads(cuda: SimulatedCuda) -> None:
    work = _captured(torch.ones(4, device="cuda"))
    gc.collect()
    work.load(torch.zeros(4, device="cuda"))
    work.replay()


def test_work_that_waits_for_the_host_is_not_captured(cuda: SimulatedCuda) -> None:
    with pytest.raises(RuntimeError, match="capturing"):
        CapturedWork(lambda states: states.sum().item(), torch.ones(4, device="cuda"))
