"""Stand-ins for `torch.cuda`: streams, events, graphs, and what asks about devices."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from simulated_cuda.commands import EventRecord, Replay, map_tensors, place, tensors_in
from simulated_cuda.tensor import Allocation, SimulatedCuda, SimulatedTensor

T = TypeVar("T")

_NAME = "Simulated GPU"
PROCESSORS = 132
_L2_BYTES = 1 << 16
_MEMORY_BYTES = 80 << 30
SHARED_BYTES = 232448


def stand_ins(cuda: SimulatedCuda) -> dict[str, Any]:
    """What replaces the names of `torch.cuda`; each device begins with its default stream."""
    stream_class = _bound(Stream, cuda)
    defaults = [stream_class(number, default=True) for number in range(cuda.num_devices)]
    cuda.current_streams = list(defaults)

    def index(device: Any = None) -> int:
        found = cuda.device_of_name("cuda" if device is None else device)
        if found.type != "cuda":
            raise ValueError(f"expected a cuda device, but got {found}")
        return int(found.index)

    def set_device(device: Any) -> None:
        cuda.current_device = index(device)

    def synchronize(device: Any = None) -> None:
        index(device)
        cuda.wait("synchronize")

    @contextlib.contextmanager
    def on_device(device: Any) -> Iterator[None]:
        before = cuda.current_device
        if device is not None:
            cuda.current_device = index(device)
        try:
            yield
        finally:
            cuda.current_device = before

    def device_of(tensor: Tensor) -> Any:
        return on_device(tensor.device if tensor.is_cuda else None)

    @contextlib.contextmanager
    def on_stream(stream: Stream | None) -> Iterator[None]:
        if stream is None:
            yield
            return
        with on_device(stream.device):
            before = cuda.current_streams[stream.device_index]
            cuda.current_streams[stream.device_index] = stream
            try:
                yield
            finally:
                cuda.current_streams[stream.device_index] = before

    @contextlib.contextmanager
    def capture(
        cuda_graph: Graph,
        pool: object = None,
        stream: Stream | None = None,
        capture_error_mode: str = "global",
    ) -> Iterator[None]:
        cuda.wait("synchronize")
        with on_stream(stream_class() if stream is None else stream):
            cuda_graph.capture_begin()
            try:
                yield
            finally:
                cuda_graph.capture_end()

    def properties(device: Any = None) -> SimpleNamespace:
        return SimpleNamespace(
            name=_NAME, uuid=f"00000000-0000-0000-0000-{index(device):012d}", major=9, minor=0,
            multi_processor_count=PROCESSORS, L2_cache_size=_L2_BYTES, total_memory=_MEMORY_BYTES,
            shared_memory_per_block=49152, shared_memory_per_block_optin=SHARED_BYTES,
            shared_memory_per_multiprocessor=233472, regs_per_multiprocessor=65536, warp_size=32,
            max_threads_per_multi_processor=2048, is_integrated=False,
        )  # fmt: skip

    def reset_peak(device: Any = None) -> None:
        use = cuda.memory[index(device)]
        use.peak = use.allocated

    def statistics(device: Any = None) -> dict[str, int]:
        use = cuda.memory[index(device)]
        return {
            "allocated_bytes.all.current": use.allocated,
            "allocated_bytes.all.peak": use.peak,
            "reserved_bytes.all.current": use.allocated,
        }

    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "init": lambda: None,
        "_lazy_init": lambda: None,
        "device_count": lambda: cuda.num_devices,
        "current_device": lambda: cuda.current_device,
        "set_device": set_device,
        "device": on_device,
        "device_of": device_of,
        "synchronize": synchronize,
        "Stream": stream_class,
        "stream": on_stream,
        "current_stream": lambda device=None: cuda.current_streams[index(device)],
        "default_stream": lambda device=None: defaults[index(device)],
        "Event": _bound(Event, cuda),
        "CUDAGraph": _bound(Graph, cuda),
        "graph": capture,
        "is_current_stream_capturing": lambda: cuda.capturing is not None,
        "get_device_properties": properties,
        "get_device_name": lambda device=None: properties(device).name,
        "get_device_capability": lambda device=None: (9, 0),
        "is_bf16_supported": lambda including_emulation=True: True,
        "memory_allocated": lambda device=None: cuda.memory[index(device)].allocated,
        "memory_reserved": lambda device=None: cuda.memory[index(device)].allocated,
        "max_memory_allocated": lambda device=None: cuda.memory[index(device)].peak,
        "max_memory_reserved": lambda device=None: cuda.memory[index(device)].peak,
        "reset_peak_memory_stats": reset_peak,
        "memory_stats": statistics,
        "mem_get_info": lambda device=None: (
            _MEMORY_BYTES - cuda.memory[index(device)].allocated,
            _MEMORY_BYTES,
        ),
        "empty_cache": lambda: None,
        "_sleep": lambda cycles: None,
    }


def _bound(stand_in: type[T], cuda: SimulatedCuda) -> type[T]:
    """The class `stand_in` of one simulation."""
    return type(stand_in.__name__, (stand_in,), {"cuda": cuda})


class Stream:
    """`torch.cuda.Stream`; work of all streams is done in the order of the calls.

    cuda_stream: its handle, 0 for a device's default stream. graph: that it is captured in.
    """

    cuda: ClassVar[SimulatedCuda]

    def __init__(self, device: Any = None, priority: int = 0, *, default: bool = False) -> None:
        self.device = self.cuda.device_of_name("cuda" if device is None else device)
        self.device_index = int(self.device.index)
        self.cuda.num_streams += not default
        self.cuda_stream = 0 if default else self.cuda.num_streams
        self.graph: Graph | None = None

    def synchronize(self) -> None:
        self.cuda.wait("stream.synchronize")

    def query(self) -> bool:
        return True

    def wait_stream(self, stream: Stream) -> None:
        """Work is done in the order of the calls already."""

    def wait_event(self, event: Event) -> None:
        """See `wait_stream`."""

    def record_event(self, event: Event | None = None) -> Event:
        event = _bound(Event, self.cuda)() if event is None else event
        event.record(self)
        return event


class Event:
    """`torch.cuda.Event`; its time is that of the simulated clock."""

    cuda: ClassVar[SimulatedCuda]

    def __init__(self, enable_timing: bool = False, **_: Any) -> None:
        self._timed, self._time_us = enable_timing, -1
        self.cuda.num_events += 1
        self.number = self.cuda.num_events

    def record(self, stream: Stream | None = None) -> None:
        self.cuda.do(EventRecord(self.number, place()))
        self._time_us = self.cuda.clock_us

    def wait(self, stream: Stream | None = None) -> None:
        """Work is done in the order of the calls already."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        self.cuda.wait("event.synchronize")

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds to `end`."""
        if not (self._timed and end._timed):
            raise ValueError("both events must be created with enable_timing=True")
        if self._time_us < 0 or end._time_us < 0:
            raise ValueError("both events must be recorded before their time is taken")
        return (end._time_us - self._time_us) / 1e3


class Graph:
    """`torch.cuda.CUDAGraph`: the operations and launches of a capture, to be done again.

    It owns what was allocated while it was captured, and nothing else: a replay after the owner of
    a tensor that it reads has dropped it raises.
    """

    cuda: ClassVar[SimulatedCuda]

    def __init__(self, keep_graph: bool = False) -> None:
        self.pool: list[Allocation] = []
        self._nodes: list[Callable[[], object]] = []
        self._reads: dict[int, tuple[weakref.ref[Allocation], str]] = {}
        self._stream: Stream | None = None

    def capture_begin(self, pool: object = None, capture_error_mode: str = "global") -> None:
        self._stream = self.cuda.current_streams[self.cuda.current_device]
        if self._stream.cuda_stream == 0:
            raise RuntimeError("CUDA graphs must be captured on a non-default stream")
        self._stream.graph = self

    def capture_end(self) -> None:
        assert self._stream is not None
        self._stream.graph = None

    def add_operation(
        self,
        func: Any,
        args: Any,
        kwargs: Any,
        made: Sequence[Tensor],
        simulated: Sequence[SimulatedTensor],
    ) -> None:
        """Take in an operation that made the CPU tensors `made`."""
        self._read(simulated, str(func))
        # Values on the host are part of a captured kernel's arguments.
        held = {id(each.memory) for each in simulated}
        baked = map_tensors((args, kwargs), lambda t: t if id(t) in held else t.clone())

        def node() -> None:
            for old, new in zip(made, tensors_in(func(*baked[0], **baked[1])), strict=True):
                if old is not new:
                    old.copy_(new)

        self._nodes.append(node)

    def add_launch(self, kernel: str, run: Callable[[], object], tensors: Sequence[Tensor]) -> None:
        """Take in a Triton launch, which `run` does again."""
        self._read([each for each in tensors if isinstance(each, SimulatedTensor)], kernel)
        self._nodes.append(run)

    def _read(self, tensors: Sequence[SimulatedTensor], reader: str) -> None:
        owned = set(map(id, self.pool))
        for each in tensors:
            if id(each.allocation) not in owned:
                what = f"{tuple(each.shape)} of {each.dtype}, which {reader} uses at {place()}"
                self._reads.setdefault(id(each.allocation), (weakref.ref(each.allocation), what))

    def replay(self) -> None:
        for allocation, what in self._reads.values():
            if allocation() is None:
                raise RuntimeError(f"a captured graph reads freed memory: {what}")
        self.cuda.do(Replay(len(self._nodes), place()))
        self.cuda.clock_us += len(self._nodes)
        with outside_modes():
            for node in self._nodes:
                node()

    def reset(self) -> None:
        self.pool.clear()
        self._nodes.clear()
        self._reads.clear()


@contextlib.contextmanager
def outside_modes() -> Iterator[None]:
    """Torch operations as they are, on CPU tensors, unseen by the simulation."""
    with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
        yield
