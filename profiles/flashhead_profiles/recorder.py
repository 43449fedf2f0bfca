"""Records ranges inside this process, to split a step into its parts without any profiler.

On the CPU two readings of the clock a range; on CUDA two events on the current stream, so that a
range lasts from the end of what was launched before it to the end of what was launched in it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from flashhead_profiles.ranges import listening, split_message


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
