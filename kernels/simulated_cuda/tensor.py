"""Simulated tensors, and the rules that each operation on them is held to."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from simulated_cuda.commands import (
    Command,
    HostWait,
    Launch,
    Operation,
    map_tensors,
    place,
    tensors_in,
)

if TYPE_CHECKING:
    from simulated_cuda.runtime import Graph, Stream

_WAITS = {
    "_local_scalar_dense": "item", "nonzero": "nonzero", "masked_select": "masked_select",
    "_unique2": "unique", "unique_dim": "unique", "unique_consecutive": "unique",
    "equal": "equal", "bincount": "bincount", "_linalg_check_errors": "linalg errors",
    "_linalg_eigh": "linalg errors", "_linalg_svd": "linalg errors",
}  # fmt: skip
"""Operations whose result the host reads, and how the wait is named."""
_NO_LAUNCH = frozenset(
    {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "lift_fresh",
     "_unsafe_view", "_local_scalar_dense", "resize_", "set_", "is_pinned"}
)  # fmt: skip
_RESHAPED_IN_PLACE = "changes a simulated tensor's shape in place, which is not supported"


class SimulatedTensor(Tensor):
    """A tensor that reports a CUDA device; `memory` is the CPU tensor that holds its values."""

    memory: Tensor
    allocation: Allocation
    simulation: SimulatedCuda

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls: type[SimulatedTensor],
        memory: Tensor,
        device: torch.device,
        allocation: Allocation,
        cuda: SimulatedCuda,
    ) -> SimulatedTensor:
        # A view of a tensor from outside inference mode is none of inference mode's.
        with torch.inference_mode(memory.is_inference()):
            made: SimulatedTensor = torch.Tensor._make_wrapper_subclass(
                cls,
                memory.shape,
                strides=memory.stride(),
                storage_offset=memory.storage_offset(),
                dtype=memory.dtype,
                layout=memory.layout,
                device=device,
            )
        made.memory, made.allocation, made.simulation = memory, allocation, cuda
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        simulated = next(each for each in tensors_in((args, kwargs)) if isinstance(each, cls))
        return simulated.simulation.dispatch(func, args, kwargs or {})

    def data_ptr(self) -> int:
        return self.memory.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.memory.untyped_storage()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied: Tensor = self.detach().clone().requires_grad_(self.requires_grad)
        memo[id(self)] = copied
        return copied

    def record_stream(self, stream: object) -> None:
        """Memory is freed when no tensor holds it, whatever the streams do."""

    def tolist(self) -> Any:
        self.simulation.wait("tolist")
        return self.memory.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        if force:
            return self.cpu().numpy()
        raise TypeError(
            f"can't convert {self.device} device type tensor to numpy. "
            "Use Tensor.cpu() to copy the tensor to host memory first."
        )

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return self.numpy()

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if self.dim() == 0 else repr(self)

    def __repr__(  # type: ignore[override]
        self, *, tensor_contents: Any = None
    ) -> str:
        return f"SimulatedTensor({self.memory!r}, device={self.device})"


@dataclass
class SimulatedCuda:
    """What happened on the simulated devices, and their state.

    commands: everything since the last `reset`, in the order of the calls.
    clock_us: simulated time; each command takes a device 1 microsecond.
    """

    num_devices: int = 1
    commands: list[Command] = field(default_factory=list)
    clock_us: int = 0
    current_device: int = 0
    memory: list[MemoryUse] = field(default_factory=list)
    current_streams: list[Stream] = field(default_factory=list)
    num_streams: int = 0
    num_events: int = 0

    def __post_init__(self) -> None:
        self.memory = [MemoryUse() for _ in range(self.num_devices)]

    @property
    def host_waits(self) -> list[HostWait]:
        """The times that the host waited."""
        return [command for command in self.commands if isinstance(command, HostWait)]

    @property
    def operations(self) -> list[Operation]:
        """The torch operations that launched a kernel."""
        return [command for command in self.commands if isinstance(command, Operation)]

    @property
    def launches(self) -> list[Launch]:
        """The Triton launches."""
        return [command for command in self.commands if isinstance(command, Launch)]

    def reset(self) -> None:
        """Forget all commands."""
        self.commands.clear()

    @property
    def capturing(self) -> Graph | None:
        """The graph that the current stream is captured in."""
        return self.current_streams[self.current_device].graph

    def wait(self, name: str) -> None:
        """The host waits for a device.

        Raises:
            RuntimeError: while a graph is captured.
        """
        if any(stream.graph is not None for stream in self.current_streams):
            raise RuntimeError(
                "CUDA error: operation not permitted when stream is capturing: "
                f"{name} at {place()} waits for the host"
            )
        self.commands.append(HostWait(name, place()))

    def do(self, command: Command) -> None:
        """Note `command` and let time pass."""
        self.commands.append(command)
        self.clock_us += 1

    def device_of_name(self, name: Any) -> Any:
        """The device that `name` (str, int or device) means, CUDA's with an index."""
        if isinstance(name, bool) or not isinstance(name, str | int | torch.device):
            return name
        device = torch.device("cuda", name) if isinstance(name, int) else torch.device(name)
        if device.type != "cuda":
            return device
        index = self.current_device if device.index is None else device.index
        if index >= self.num_devices:
            raise RuntimeError(f"CUDA error: invalid device ordinal {index}")
        return torch.device("cuda", index)

    def wrap(self, memory: Tensor, device: torch.device, sources: Sequence[Tensor]) -> Tensor:
        """`memory` as a tensor of `device`; it may be a view of one of `sources`."""
        address = memory.untyped_storage().data_ptr()
        for source in sources:
            if address and source.untyped_storage().data_ptr() == address:
                assert isinstance(source, SimulatedTensor)
                return SimulatedTensor(memory, device, source.allocation, self)
        allocation = Allocation(self, device, memory.untyped_storage().nbytes())
        if self.capturing is not None:
            self.capturing.pool.append(allocation)
        return SimulatedTensor(memory, device, allocation, self)

    def dispatch(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run one operation on the memory of its tensors, under CUDA's rules."""
        tensors = tensors_in((args, kwargs))
        simulated = [each for each in tensors if isinstance(each, SimulatedTensor)]
        asked = kwargs.get("device")
        to_cuda = asked is not None and asked.type == "cuda"
        if not simulated and not to_cuda:
            return func(*args, **kwargs)
        if _is_composite(func):
            # Under inference mode torch does not decompose operations by itself.
            with Dispatch(self):
                return func.decompose(*args, **kwargs)
        device = self.device_of_name(asked) if asked is not None else simulated[0].device
        name = func.overloadpacket.__name__
        self._check_devices(func, name, args, tensors)
        waits_for = _wait_of(name, args, kwargs, device)
        if waits_for is not None:
            self.wait(waits_for)
        own_args, own_kwargs = memory_of(args), memory_of(kwargs)
        if to_cuda:
            own_kwargs["device"] = torch.device("cpu")
        result = func(*own_args, **own_kwargs)
        if torch.Tag.inplace_view in func.tags:
            # The tensor itself is given its memory's new shape.
            with torch._C._DisableTorchDispatch():
                func(*args, **kwargs)
        if name.endswith("_") and any(each.memory.shape != each.shape for each in simulated):
            raise NotImplementedError(f"{func} {_RESHAPED_IN_PLACE}")
        if not _only_views(func) and name not in _NO_LAUNCH:
            self._note(func, own_args, own_kwargs, result, simulated)
        if device.type != "cuda":
            return result
        return self._wrapped(result, device, tensors)

    def _check_devices(self, func: Any, name: str, args: Any, tensors: Sequence[Tensor]) -> None:
        """Raise where tensors lie on several devices and CUDA's kernel would not take them."""
        if name in ("copy_", "_to_copy"):
            return
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            # Indices may lie on the CPU beside a tensor on a GPU; not the other way round.
            own = [args[0], *(t for t in tensors_in(args[1]) if t.device.type == "cuda")]
            tensors = [*own, *tensors_in(args[2:3])]
        scalars = torch.Tag.pointwise in func.tags or name in ("index_put_", "fill_", "index_put")
        devices = {
            each.device
            for each in tensors
            if not (scalars and each.dim() == 0 and each.device.type == "cpu")
        }
        if len(devices) > 1:
            found = " and ".join(sorted(map(str, devices)))
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"{found}, in {func} at {place()}"
            )

    def _note(
        self,
        func: Any,
        args: Any,
        kwargs: Any,
        result: Any,
        simulated: Sequence[SimulatedTensor],
    ) -> None:
        made = tensors_in(result)
        if made and not any(each.numel() for each in made):
            return
        device = simulated[0].device if simulated else self.device_of_name("cuda")
        self.do(Operation(str(func), device, place()))
        if self.capturing is not None:
            self.capturing.add_operation(func, args, kwargs, made, simulated)

    def _wrapped(self, result: Any, device: torch.device, sources: Sequence[Tensor]) -> Any:
        """`result` with its tensors on `device`; one that was given comes back as it was given."""
        if isinstance(result, Tensor):
            for source in sources:
                if isinstance(source, SimulatedTensor) and source.memory is result:
                    return source
            return self.wrap(result, device, sources)
        if isinstance(result, list | tuple):
            return type(result)(self._wrapped(each, device, sources) for each in result)
        return result

    def launch(self, kernel: str, grid: tuple[int, ...], tensors: Sequence[Tensor]) -> None:
        """Note a Triton launch.

        Raises:
            ValueError: a tensor on the CPU, which a kernel cannot read.
            RuntimeError: tensors that are not all on the current device: a GPU would fault.
        """
        devices = {each.device for each in tensors}
        if any(device.type != "cuda" for device in devices):
            raise ValueError(f"a pointer argument of {kernel} cannot be accessed: a CPU tensor")
        device = next(iter(devices), None)
        self.do(Launch(kernel, grid, self.current_device, device, place()))
        if devices - {torch.device("cuda", self.current_device)}:
            raise RuntimeError(
                f"{kernel} is launched on cuda:{self.current_device}, the current device, with "
                f"tensors on {' and '.join(sorted(map(str, devices)))} at {place()}"
            )


class Allocation:
    """Device memory, shared by a tensor and its views, free once none of them is left."""

    def __init__(self, cuda: SimulatedCuda, device: torch.device, num_bytes: int) -> None:
        self.use, self.num_bytes = cuda.memory[device.index], num_bytes
        self.use.add(num_bytes)

    def __del__(self) -> None:
        self.use.add(-self.num_bytes)


@dataclass
class MemoryUse:
    """Bytes of one device."""

    allocated: int = 0
    peak: int = 0

    def add(self, num_bytes: int) -> None:
        self.allocated += num_bytes
        self.peak = max(self.peak, self.allocated)


class Devices(TorchFunctionMode):
    """Gives every `device` argument of CUDA its index before torch parses it.

    torch would ask a CUDA runtime for the current device.
    """

    def __init__(self, cuda: SimulatedCuda) -> None:
        super().__init__()
        self.cuda = cuda

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.new_tensor:
            kwargs = {"device": args[0].device} | kwargs
        if kwargs.get("device") is not None:
            kwargs = kwargs | {"device": self.cuda.device_of_name(kwargs["device"])}
        if kwargs.get("pin_memory"):
            kwargs = kwargs | {"pin_memory": False}
        if func is Tensor.pin_memory:
            return args[0]
        if func is Tensor.cuda:
            device = kwargs.pop("device", args[1] if len(args) > 1 else None)
            device = self.cuda.current_device if device is None else device
            return args[0].to(self.cuda.device_of_name(device), **kwargs)
        if func is Tensor.to and len(args) > 1 and not isinstance(args[1], torch.dtype | Tensor):
            args = (args[0], self.cuda.device_of_name(args[1]), *args[2:])
        return func(*args, **kwargs)


class Dispatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operation, those that make tensors included."""

    def __init__(self, cuda: SimulatedCuda) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.cuda = cuda

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self.cuda.dispatch(func, args, kwargs or {})


def _wait_of(name: str, args: Any, kwargs: dict[str, Any], device: torch.device) -> str | None:
    """What the host waits for in an operation whose result lies on `device`, None for nothing."""
    if name in _WAITS:
        return _WAITS[name]
    if name in ("copy_", "_to_copy"):
        target, source = (args[0].device, args[1]) if name == "copy_" else (device, args[0])
        blocking = not kwargs.get("non_blocking", name == "copy_" and args[2:3] == (True,))
        apart = {target.type, source.device.type} == {"cpu", "cuda"}
        return f"copy to {target.type}" if apart and blocking and source.numel() else None
    if name == "repeat_interleave" and kwargs.get("output_size") is None:
        return name
    if name in ("index", "index_put", "index_put_"):
        indices = tensors_in(args[1])
        masks = [each for each in indices if each.dtype in (torch.bool, torch.uint8)]
        # A number under one mask is filled in by a kernel that reads the mask.
        filled = name != "index" and args[2].numel() == 1 and args[2].device.type == "cpu"
        if any(each.device.type == "cpu" for each in indices):
            return "index from cpu"
        if masks and not (filled and len(indices) == 1):
            return "boolean index"
    return None


@functools.cache
def _is_composite(func: Any) -> bool:
    """Whether an operation is made of others."""
    name = func.name()
    found: bool = torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd")
    return found


@functools.cache
def _only_views(func: Any) -> bool:
    """Whether an operation gives views of its arguments."""
    returns = func._schema.returns
    return bool(returns) and all(
        each.alias_info is not None and not each.alias_info.is_write for each in returns
    )


def memory_of(tree: Any) -> Any:
    """`tree` with the CPU memory of simulated tensors in their place."""
    return map_tensors(tree, lambda t: t.memory if isinstance(t, SimulatedTensor) else t)
