"""Named ranges of a step, for NVTX tools, torch.profiler, and a recorder of this process.

    with annotate("head", payload=len(hidden_states), label=self.name):
        ...

The names are fixed (`NAMES`), so that readers and filters can rely on them. The payload is a
number; the label follows the name after a colon (`head:flashhead`). All are in one NVTX domain.
Without a listener a range is one function call that returns a shared object.

NVTX is used through the package of that name if it is installed and a tool is attached
(https://nvidia.github.io/NVTX/python/); torch.profiler through `record_function`, which carries no
payload. Ranges nest, and each must end on the thread that began it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, ClassVar, Protocol, cast

import torch
from torch.autograd import profiler as torch_profiler

DOMAIN = "flashhead"
STEP, BODY, HEAD = "step", "body", "head"
CENTROIDS, CANDIDATES, EXCHANGE = "head/centroids", "head/candidates", "head/exchange"
CHECK, RESULT, CONFIRM = "head/check", "head/result", "confirm"
SEND, RECEIVE = "pipeline/send", "pipeline/recv"
CAPTURE = "capture"
NAMES = (
    CAPTURE,
    STEP,
    BODY,
    HEAD,
    CHECK,
    CENTROIDS,
    CANDIDATES,
    EXCHANGE,
    RESULT,
    CONFIRM,
    SEND,
    RECEIVE,
)
"""Every name that is emitted. docs/guides/profiling.md explains each."""


class Listener(Protocol):
    """Notified of every range as it begins and ends."""

    def begin(self, message: str, payload: int | None) -> None:
        """A range begins, inside those that have not ended."""

    def end(self) -> None:
        """The range that began last ends."""


class _Nothing:
    """A range without a listener.

    Entered without arguments it gives None, and left with three the false value that lets an
    exception pass. Compiled callables do both in half the time that methods in Python take.
    """

    __slots__ = ()
    __enter__: ClassVar[Any] = type(None)
    __exit__: ClassVar[Any] = "".format


class _Nvtx:
    """Ranges in our NVTX domain."""

    def __init__(self, domain: Any) -> None:
        self._domain = domain
        self._plain: dict[str, Any] = {}

    def begin(self, message: str, payload: int | None) -> None:
        if payload is not None:
            # Not kept: a tool reads the attributes during the call, other threads may push too.
            self._domain.push_range(self._domain.get_event_attributes(message, payload=payload))
            return
        attributes = self._plain.get(message)
        if attributes is None:
            attributes = self._plain[message] = self._domain.get_event_attributes(message)
        self._domain.push_range(attributes)

    def end(self) -> None:
        self._domain.pop_range()


class _Range:
    """A range with a listener; `message` changes between its parts."""

    __slots__ = ("_function", "_heard", "_messages", "_payload", "_place")

    def __init__(self, messages: tuple[str, ...], payload: int | None) -> None:
        self._messages, self._payload = messages, payload
        self._place = 0

    def __enter__(self) -> Callable[[], None]:
        self._open()
        return self.next_part

    def next_part(self) -> None:
        """End the present part and begin the next one; the last part stays."""
        if self._place + 1 < len(self._messages):
            self._close(None, None, None)
            self._place += 1
            self._open()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._close(kind, error, traceback)

    def _open(self) -> None:
        message = self._messages[self._place]
        # Whoever begins to listen inside this range is not told of its end.
        self._heard = tuple(_listeners)
        self._function: Any = None
        if torch_profiler._is_profiler_enabled:
            self._function = torch_profiler.record_function(message)
            self._function.__enter__()
        for listener in self._heard:
            listener.begin(message, self._payload)

    def _close(self, *details: Any) -> None:
        for listener in reversed(self._heard):
            listener.end()
        if self._function is not None:
            self._function.__exit__(*details)


_Entered = AbstractContextManager[Callable[[], None] | None]
_NOTHING = cast(_Entered, _Nothing())
_MESSAGES: dict[tuple[str, str | None], str] = {(name, None): name for name in NAMES}
_listeners: list[Listener] = []


def annotate(name: str, payload: int | None = None, label: str | None = None) -> _Entered:
    """A context manager that covers its block with a range.

    Args:
        name: one of `NAMES`.
        payload: rows, bytes or a count, see docs/guides/profiling.md; NVTX carries it.
        label: which of several of this name: a head's name, for one.

    Raises:
        KeyError: a listener is there, and the name is not one of `NAMES`.
    """
    if not _listeners and not torch_profiler._is_profiler_enabled:
        return _NOTHING
    return _Range((_message(name, label),), payload)


def in_parts(*names: str) -> _Entered:
    """A context manager over parts that follow each other without a gap: a range for each.

    Its value is a function that ends the present part and begins the next one, to be called once
    between two parts; None without a listener, so that parts that are faster in one call stay one.
    """
    if not _listeners and not torch_profiler._is_profiler_enabled:
        return _NOTHING
    return _Range(tuple(_message(name, None) for name in names), None)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Tell `listener` of every range that begins inside the block, on any thread."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def attach_nvtx() -> bool:
    """Emit NVTX ranges if the `nvtx` package is here and a tool is attached to this process.

    Done once when this module is imported. Returns whether ranges are emitted.
    """
    if any(isinstance(listener, _Nvtx) for listener in _listeners):
        return True
    try:
        import nvtx
    except ImportError:
        return False
    domain = nvtx.get_domain(DOMAIN)
    # Without a tool it is a DummyDomain, whose ranges go nowhere.
    if not isinstance(domain, nvtx.Domain):
        return False
    _listeners.insert(0, _Nvtx(domain))
    return True


def _message(name: str, label: str | None) -> str:
    found = _MESSAGES.get((name, label))
    if found is None:
        found = _MESSAGES[name, label] = f"{_MESSAGES[name, None]}:{label}"
    return found


def split_message(message: str) -> tuple[str, str | None]:
    """Name and label of an emitted message; raises ValueError where it is not one of ours."""
    name, _, label = message.partition(":")
    if name not in NAMES:
        raise ValueError(f"{message!r} is not a range of ours")
    return name, label or None


attach_nvtx()


@dataclass(frozen=True)
class Span:
    """A range that has ended. `depth` is the number of recorded ranges around it."""

    name: str
    label: str | None
    payload: int | None
    start_us: float
    duration_us: float
    depth: int


@dataclass
class _Open:
    message: str
    payload: int | None
    start: Any
    stop: Any = None
    depth: int = 0


class Recorder:
    """A listener for one thread that keeps the ranges it is told of, in their order of beginning.

    device: whose work the ranges cover.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._on_cuda = torch.device(device).type == "cuda"
        self._ranges: list[_Open] = []
        self._stack: list[_Open] = []

    def begin(self, message: str, payload: int | None) -> None:
        """See `ranges.Listener`."""
        found = _Open(message, payload, self._now(), depth=len(self._stack))
        self._ranges.append(found)
        self._stack.append(found)

    def end(self) -> None:
        """See `ranges.Listener`."""
        self._stack.pop().stop = self._now()

    def take(self) -> list[Span]:
        """The ranges recorded since the last call, which must all have ended; waits for CUDA.

        Times count from the first of them.

        Raises:
            RuntimeError: a range is still open.
        """
        if self._stack:
            raise RuntimeError(f"the range {self._stack[-1].message} has not ended")
        ranges, self._ranges = self._ranges, []
        if not ranges:
            return []
        first = ranges[0].start
        return [
            Span(
                *split_message(found.message),
                payload=found.payload,
                start_us=self._between_us(first, found.start),
                duration_us=self._between_us(found.start, found.stop),
                depth=found.depth,
            )
            for found in ranges
        ]

    def _now(self) -> Any:
        if not self._on_cuda:
            return time.perf_counter_ns()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _between_us(self, start: Any, stop: Any) -> float:
        if not self._on_cuda:
            return float(stop - start) / 1e3
        stop.synchronize()
        return float(start.elapsed_time(stop)) * 1e3


@contextmanager
def recording(device: torch.device | str = "cpu") -> Iterator[Recorder]:
    """Record the ranges of the block."""
    recorder = Recorder(device)
    with listening(recorder):
        yield recorder
