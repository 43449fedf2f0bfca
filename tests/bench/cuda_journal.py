"""Stand-ins for events, streams, graphs and collectives that keep the order in which they are used.

Tensors stay on the CPU. A dispatch mode notes every operation on a tensor as large as the L2 cache,
and whether it reads or writes it.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

L2_BYTES = 64 << 20
EVENT_MS = 0.25
READ, WRITE, WAIT, START, STOP, STREAM_MEETING, HOST_MEETING, WORK, REPLAY = (
    "read", "write", "host waits", "start", "stop", "meet on stream", "meet on host", "work",
    "replay",
)  # fmt: skip


class Journal:
    """What happened, in order, since the last `clear`."""

    def __init__(self, patch: pytest.MonkeyPatch, *, backend: str = "nccl") -> None:
        self.log: list[str] = []
        for name, value in _cuda(self.log).items():
            patch.setattr(torch.cuda, name, value)
        patch.setattr(dist, "get_backend", lambda group=None: backend)
        patch.setattr(dist, "all_reduce", self._note(STREAM_MEETING))
        patch.setattr(dist, "barrier", self._note(HOST_MEETING))

    def _note(self, what: str) -> Callable[..., None]:
        return lambda *given, **named: self.log.append(what)

    def work(self) -> None:
        """Stands for launches."""
        self.log.append(WORK)

    @contextlib.contextmanager
    def watching(self) -> Iterator[list[str]]:
        """The log of the block, with its reads and writes of large tensors."""
        self.log.clear()
        with _LargeTensors(self.log):
            yield self.log


def problem_of(log: list[str], *, ranks_meet: bool) -> str | None:
    """Why the order of calls does not time a GPU's own work on a cold cache; None if it does.

    The log may hold several timed pieces of work. Each has to be: reads of a large buffer, the
    ranks' meeting on the stream, start event, work, stop event, and only then a wait of the host.
    """
    text = ";".join(log)
    if WRITE in text:
        return "a large buffer is written"
    if HOST_MEETING in text:
        return "ranks meet on the host"
    meeting = f"{STREAM_MEETING};" if ranks_meet else ""
    piece = f"({READ};)+{meeting}{START};({WORK}|{REPLAY});{STOP};{WAIT};"
    if not re.fullmatch(f"({piece})+", text + ";"):
        return f"the order is {text}"
    return None


class _LargeTensors(TorchDispatchMode):
    def __init__(self, log: list[str]) -> None:
        super().__init__()
        self._log = log

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for place, argument in enumerate(func._schema.arguments):
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            if isinstance(value, torch.Tensor) and value.nbytes >= 2 * L2_BYTES:
                writes = argument.alias_info is not None and argument.alias_info.is_write
                self._log.append(WRITE if writes else READ)
        return func(*args, **kwargs)


def _cuda(log: list[str]) -> dict[str, Any]:
    events: list[object] = []

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: object = None) -> None:
            events.append(self)
            log.append(START if len(events) % 2 else STOP)

        def synchronize(self) -> None:
            log.append(WAIT)

        def elapsed_time(self, stop: Event) -> float:
            assert events[-2:] == [self, stop]
            return EVENT_MS

    class Stream:
        def __init__(self, device: object = None) -> None: ...
        def wait_stream(self, other: object) -> None: ...
        def synchronize(self) -> None:
            log.append(WAIT)

    class Graph:
        def replay(self) -> None:
            log.append(REPLAY)

    @contextlib.contextmanager
    def nothing(*given: object, **named: object) -> Iterator[None]:
        yield

    return {
        "Event": Event,
        "Stream": Stream,
        "CUDAGraph": Graph,
        "graph": nothing,
        "stream": nothing,
        "current_stream": Stream,
        "synchronize": lambda device=None: log.append(WAIT),
        "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=L2_BYTES),
    }
