"""The simulation itself: it raises where CUDA raises, and counts what a GPU would make wait."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch import Tensor

if TYPE_CHECKING:
    from simulated_cuda import SimulatedCuda

Run = Callable[[Tensor], object]


def test_tensors_report_the_device_they_were_made_on(cuda: SimulatedCuda) -> None:
    one = torch.device("cuda:1")
    assert torch.zeros(2, device="cuda").device == torch.device("cuda:0")
    assert torch.tensor([1], device="cuda:1").device == one
    assert torch.zeros(2).to(1).device == torch.zeros(2).cuda(1).device == one
    assert torch.zeros(2, device=one).is_cuda
    with torch.cuda.device(1):
        made = [torch.arange(3, device="cuda"), torch.zeros(1).cuda(), torch.zeros(1).to("cuda")]
        assert [each.device for each in made] == [one] * 3
    zero = torch.zeros(2, device="cuda")
    assert zero.new_ones(3).device == zero.new_tensor([1.0]).device == torch.device("cuda:0")
    assert torch.zeros_like(made[0]).device == one
    assert torch.zeros(2).device == made[0].cpu().device == torch.device("cpu")
    assert made[0].to("cuda:1") is made[0]
    assert torch.equal(copy.deepcopy(made[0]).cpu(), torch.arange(3))
    with pytest.raises(RuntimeError, match="ordinal"):
        torch.zeros(1, device="cuda:2")


def test_a_view_shares_memory_and_a_copy_does_not(cuda: SimulatedCuda) -> None:
    x = torch.zeros(2, 3, device="cuda")
    view, moved = x[1], x.cpu()
    view.add_(1)
    assert x.sum().item() == 3
    assert moved.sum().item() == 0
    assert view.data_ptr() == x.data_ptr() + 12


def test_a_shape_can_change_in_place(cuda: SimulatedCuda) -> None:
    x = torch.arange(3, device="cuda")
    assert x.unsqueeze_(0).shape == x.shape == (1, 3)
    assert x.t_().tolist() == [[0], [1], [2]]
    assert x.squeeze_(1).add_(1).tolist() == [1, 2, 3]


MIXED: list[Run] = [
    lambda x: x + torch.arange(4),
    lambda x: x + torch.arange(4, device="cuda:1"),
    lambda x: torch.arange(4) + x[0],
    lambda x: x.masked_fill_(torch.arange(4) > 1, 0),
    lambda x: torch.where(torch.arange(4) > 1, x, 0),
    lambda x: torch.arange(4)[x],
    lambda x: x.gather(0, torch.tensor([1])),
    lambda x: x.index_put_((torch.tensor([1, 2]),), torch.tensor([5, 6])),
    lambda x: torch.cat([x, torch.arange(2)]),
    lambda x: torch.sum(x, 0, out=torch.empty((), dtype=torch.int64)),
]


@pytest.mark.parametrize("run", MIXED)
def test_tensors_on_two_devices_raise(cuda: SimulatedCuda, run: Run) -> None:
    with pytest.raises(RuntimeError, match="same device"):
        run(torch.arange(4, device="cuda"))


def test_cuda_takes_numbers_indices_and_copies_of_the_cpu(cuda: SimulatedCuda) -> None:
    x = torch.arange(4, device="cuda")
    assert (x + torch.tensor(3)).tolist() == [3, 4, 5, 6]
    assert x[torch.tensor([2, 0])].tolist() == [2, 0]
    assert x[torch.tensor([False, True, True, False])].tolist() == [1, 2]
    x[torch.tensor([False, True, True, False])] = 9
    x[3:] = torch.tensor([7])
    assert x.tolist() == [0, 9, 9, 7]


def test_numpy_reads_no_gpu_memory(cuda: SimulatedCuda) -> None:
    x = torch.arange(4, device="cuda")
    for read in (lambda: x.numpy(), lambda: np.asarray(x)):
        with pytest.raises(TypeError, match="cuda:0"):
            read()
    assert x.cpu().numpy().tolist() == [0, 1, 2, 3]


WAITS: dict[str, Run] = {
    "item": lambda x: x[0].item(),
    "tolist": lambda x: x.tolist(),
    "nonzero": lambda x: x.nonzero(),
    "unique": lambda x: x.unique(),
    "equal": lambda x: torch.equal(x, x),
    "boolean index": lambda x: x[x > 1],
    "copy to cpu": lambda x: x.cpu(),
    "copy to cuda": lambda x: torch.tensor([1], device="cuda"),
    "index from cpu": lambda x: x[torch.tensor([1])],
    "synchronize": lambda x: torch.cuda.synchronize(),
    "stream.synchronize": lambda x: torch.cuda.current_stream().synchronize(),
    "event.synchronize": lambda x: torch.cuda.Event().synchronize(),
}


@pytest.mark.parametrize("name", WAITS)
def test_what_makes_the_host_wait_is_counted_and_refused_in_a_capture(
    cuda: SimulatedCuda, name: str
) -> None:
    x = torch.arange(4, device="cuda")
    assert not cuda.host_waits
    WAITS[name](x)
    assert [wait.name for wait in cuda.host_waits] == [name]
    assert cuda.host_waits[0].place.startswith("cuda_simulated/test_simulation.py:")
    with (
        pytest.raises(RuntimeError, match="capturing"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        WAITS[name](x)
    assert not torch.cuda.is_current_stream_capturing()


def test_bool_and_int_wait_as_well_and_a_masked_fill_does_not(cuda: SimulatedCuda) -> None:
    x = torch.arange(4, device="cuda")
    assert bool(x[1])
    assert int(x[2]) == 2
    assert f"{x[3]:d}" == "3"
    assert len(cuda.host_waits) == 3
    cuda.reset()
    x[x > 1] = 0
    x.masked_fill(x > 0, 5)
    assert not cuda.host_waits


def test_operations_are_those_that_launch_a_kernel(cuda: SimulatedCuda) -> None:
    x = torch.empty(6, device="cuda")
    x.view(2, 3).T[0].expand(4, 2)
    assert not cuda.operations
    torch.nn.functional.normalize(x.fill_(2), dim=0)
    names = [operation.name.split(".")[1] for operation in cuda.operations]
    assert names == ["fill_", "linalg_vector_norm", "clamp_min", "div"]


@torch.inference_mode()
def test_inference_mode_hides_nothing(cuda: SimulatedCuda) -> None:
    with torch.inference_mode(False):
        weight = torch.ones(2, device="cuda")
    weight.view(torch.int32).add_(0)
    cuda.reset()
    x = torch.ones(2, 3).to("cuda")
    assert x.is_inference()
    assert x.to("cuda", torch.int64).matmul(x.long().T).reshape(4).tolist() == [3] * 4
    names = [operation.name.split(".")[1] for operation in cuda.operations]
    assert names == ["_to_copy", "_to_copy", "_to_copy", "mm"]


def test_a_graph_replays_its_operations_on_what_its_inputs_hold(cuda: SimulatedCuda) -> None:
    x, graph = torch.ones(3, device="cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        assert torch.cuda.is_current_stream_capturing()
        y = (x * 2).cumsum(0)
        y[1:].add_(1)
    x.copy_(torch.tensor([1.0, 2.0, 3.0]))
    graph.replay()
    assert y.tolist() == [2, 7, 13]


def test_a_graph_that_reads_memory_which_nothing_owns_raises(cuda: SimulatedCuda) -> None:
    x, graph = torch.ones(3, device="cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = x * 2
    part = x[1:]
    del x
    graph.replay()
    del part
    with pytest.raises(RuntimeError, match="freed"):
        graph.replay()
    assert y.tolist() == [2, 2, 2]


def test_events_measure_what_lies_between_them(cuda: SimulatedCuda) -> None:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    x = torch.zeros(3, device="cuda")
    start.record()
    x.add_(1).mul_(2)
    stop.record()
    assert start.elapsed_time(stop) == pytest.approx(3e-3)
    with pytest.raises(ValueError, match="timing"):
        torch.cuda.Event().elapsed_time(stop)


def test_memory_is_freed_with_the_last_view(cuda: SimulatedCuda) -> None:
    before = torch.cuda.memory_allocated()
    x = torch.zeros(256, device="cuda")
    view = x[:1]
    del x
    assert torch.cuda.memory_allocated() == before + 1024
    del view
    assert torch.cuda.memory_allocated() == before
    assert torch.cuda.max_memory_allocated() >= before + 1024
    assert torch.cuda.memory_allocated(1) == 0


def test_a_module_moves_with_its_ties(cuda: SimulatedCuda) -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Linear(4, 5, bias=False))
    model[1].weight = model[0].weight
    tokens = torch.tensor([[1, 2]])
    expected = model(tokens).detach()
    model.to("cuda")
    assert model[0].weight is model[1].weight
    torch.testing.assert_close(model(tokens.cuda()).cpu(), expected)


def test_torch_cuda_comes_back_as_it_was() -> None:
    from simulated_cuda import simulated_cuda

    before = (torch.cuda.is_available, torch.cuda.Stream, torch.Generator)
    with simulated_cuda(1):
        assert torch.cuda.device_count() == 1
        assert torch.rand(2, generator=torch.Generator("cuda")).shape == (2,)
    assert before == (torch.cuda.is_available, torch.cuda.Stream, torch.Generator)
    with pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(1, device="cuda")
