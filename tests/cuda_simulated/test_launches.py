"""Triton launches on simulated GPUs: where they run, and on what."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from simulated_cuda import SimulatedCuda


@triton.jit
def add_one_kernel(x_ptr, count, BLOCK: tl.constexpr):
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = places < count
    tl.store(x_ptr + places, tl.load(x_ptr + places, mask=inside) + 1, mask=inside)


def test_a_kernel_runs_on_the_memory_of_its_tensors(cuda: SimulatedCuda) -> None:
    x = torch.zeros(2, 5, device="cuda")
    add_one_kernel[(2,)](x[1], 5, BLOCK=4)
    assert x.tolist() == [[0] * 5, [1] * 5]
    (launch,) = cuda.launches
    assert (launch.kernel, launch.grid, launch.current_device) == ("add_one_kernel", (2,), 0)
    assert launch.device == torch.device("cuda:0")


def test_a_launch_beside_its_tensors_device_raises(cuda: SimulatedCuda) -> None:
    x = torch.zeros(4, device="cuda:1")
    with pytest.raises(RuntimeError, match="cuda:1"):
        add_one_kernel[(1,)](x, 4, BLOCK=4)
    with torch.cuda.device_of(x):
        add_one_kernel[(1,)](x, 4, BLOCK=4)
    assert x.tolist() == [1] * 4


def test_a_launch_on_cpu_tensors_raises(cuda: SimulatedCuda) -> None:
    with pytest.raises(ValueError, match="CPU"):
        add_one_kernel[(1,)](torch.zeros(4), 4, BLOCK=4)


def test_a_graph_replays_launches(cuda: SimulatedCuda) -> None:
    x, graph = torch.zeros(4, device="cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        add_one_kernel[(1,)](x, 4, BLOCK=4)
        y = x * 2
    x.fill_(5)
    graph.replay()
    assert y.tolist() == [12] * 4
