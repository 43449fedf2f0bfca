"""Simulated CUDA devices: tensors in CPU memory that report `cuda:N` and obey CUDA's rules.

    with simulated_cuda(num_devices=2) as cuda:
        x = torch.ones(4, device="cuda:1")
        (x + 1).sum().item()
    assert [wait.name for wait in cuda.host_waits] == ["item"]

`SimulatedTensor` wraps a CPU tensor; a dispatch mode sees every operation after torch has
decomposed it, so the checks are those of a real kernel launch: all tensors on one device, host
waits counted and refused while a graph is captured. `torch.cuda` is replaced by stand-ins. Triton
kernels run in Triton's interpreter; `stub_driver` instead compiles them for a GPU that is absent
and launches nothing.

What it does not show: speed, races, stream order (all work is done in the order of the calls), and
memory faults inside kernels. It needs torch and Triton only.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton

from simulated_cuda.commands import (
    Command,
    EventRecord,
    HostWait,
    Launch,
    Operation,
    Replay,
    tensors_in,
)
from simulated_cuda.runtime import outside_modes, stand_ins
from simulated_cuda.stub import StubDriver, stub_driver
from simulated_cuda.tensor import (
    Devices,
    Dispatch,
    SimulatedCuda,
    SimulatedTensor,
    memory_of,
)

__all__ = [
    "Command",
    "EventRecord",
    "HostWait",
    "Launch",
    "Operation",
    "Replay",
    "SimulatedCuda",
    "SimulatedTensor",
    "StubDriver",
    "simulated_cuda",
    "stub_driver",
]


@contextlib.contextmanager
def simulated_cuda(num_devices: int = 2, *, interpret: bool = True) -> Iterator[SimulatedCuda]:
    """Simulate `num_devices` GPUs within the block.

    interpret: Triton kernels run in Triton's interpreter. Else they need a `stub_driver`.

    Raises:
        RuntimeError: `interpret` where Triton was imported without TRITON_INTERPRET=1.
    """
    if interpret and not triton.knobs.runtime.interpret:
        raise RuntimeError("set TRITON_INTERPRET=1 before Triton is imported")
    cuda = SimulatedCuda(num_devices)
    lifted = torch._C._only_lift_cpu_tensors()
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(torch.cuda, create=True, **stand_ins(cuda)))
        stack.enter_context(mock.patch.object(torch, "Generator", _Generator))
        stack.enter_context(_device_guard())
        # `torch.tensor(..., device="cuda")` then copies by an operation that modes see.
        torch._C._set_only_lift_cpu_tensors(True)
        stack.callback(torch._C._set_only_lift_cpu_tensors, lifted)
        # A module moved to a device then takes the moved tensors as they are, with their class.
        stack.callback(
            torch.__future__.set_swap_module_params_on_conversion,
            torch.__future__.get_swap_module_params_on_conversion(),
        )
        torch.__future__.set_swap_module_params_on_conversion(True)
        if interpret:
            stack.enter_context(_interpreted_launches(cuda))
        stack.enter_context(Devices(cuda))
        stack.enter_context(Dispatch(cuda))
        yield cuda


class _Generator(torch.Generator):
    """Generators of every device draw on the CPU, where the simulated tensors are."""

    def __new__(cls, device: object = None) -> _Generator:
        return super().__new__(cls)


@contextlib.contextmanager
def _device_guard() -> Iterator[None]:
    """A device guard for CUDA that does nothing, as the CPU's.

    torch's C++ code takes the guard of a tensor's device from this table (DeviceType::CPU is 0,
    CUDA 1), whose CUDA entry is empty in a build without CUDA.
    """
    library = ctypes.CDLL(str(next((Path(torch.__file__).parent / "lib").glob("libc10.*"))))
    table = (ctypes.c_void_p * 2).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    before = table[1]
    table[1] = table[0]
    try:
        yield
    finally:
        table[1] = before


@contextlib.contextmanager
def _interpreted_launches(cuda: SimulatedCuda) -> Iterator[None]:
    """Note the interpreter's launches, and run them on the memory of their tensors."""
    from triton.runtime import interpreter

    real, patch_language = interpreter.InterpretedFunction.run, interpreter._patch_lang

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        if warmup:
            return None
        tensors = tensors_in((args, kwargs))
        sizes = tuple(grid) if not callable(grid) else ()
        cuda.launch(self.fn.__name__, sizes, tensors)
        own_args, own_kwargs = memory_of(args), memory_of(kwargs)

        def execute() -> None:
            patched: set[int] = set()

            def patch_once(function: Any) -> Any:
                """Patch Triton's language for a launch, and not at each call within it."""
                names = id(function.__globals__)
                if names in patched:
                    return None
                patched.add(names)
                return patch_language(function)

            with outside_modes(), mock.patch.object(interpreter, "_patch_lang", patch_once):
                real(self, *own_args, grid=grid, warmup=False, **own_kwargs)

        if cuda.capturing is not None:
            cuda.capturing.add_launch(self.fn.__name__, execute, tensors)
        execute()
        return None

    with mock.patch.object(interpreter.InterpretedFunction, "run", run):
        yield
