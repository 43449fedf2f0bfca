"""Progress of a long task, with an estimate of the time left, on stderr.

A bar on a terminal; elsewhere a line after two seconds and then every ten, and one a named stage:

    with progress("collecting hidden states", total=len(texts), unit="texts") as advance:
        for text in texts:
            ...
            advance()
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

_FIRST_LINE_S, _LINE_EVERY_S = 2.0, 10.0
_LEAST_SHARE = 0.05
"""Before this share is done, no estimate is better than a bad one."""


class Advance:
    """Counts finished units; `progress` makes one."""

    def __init__(
        self, description: str, total: float, unit: str, show: Callable[[Advance, bool], None]
    ) -> None:
        self.description, self.total, self.unit = description, total, unit
        self.done = 0.0
        self._stage_weight = 0.0
        self._start_s = time.perf_counter()
        self._show = show

    def __call__(self, amount: float = 1.0) -> None:
        """`amount` more units are finished."""
        self.done = min(self.total, self.done + amount)
        self._show(self, False)

    def stage(self, description: str, weight: float = 1.0) -> None:
        """A stage of `weight` units begins; the one before it is finished."""
        self.done = min(self.total, self.done + self._stage_weight)
        self._stage_weight, self.description = weight, description
        self._show(self, True)

    def times(self) -> str:
        """Time elapsed, and an estimate of the time left once some units are finished."""
        elapsed_s = time.perf_counter() - self._start_s
        if self.done < _LEAST_SHARE * self.total or self.done >= self.total or elapsed_s < 1:
            return duration(elapsed_s)
        left_s = elapsed_s * (self.total - self.done) / self.done
        return f"{duration(elapsed_s)}, about {duration(left_s)} left"


@contextmanager
def progress(
    description: str,
    *,
    total: float,
    unit: str = "",
    visible: bool = True,
    console: Console | None = None,
) -> Iterator[Advance]:
    """Show the progress of `total` units; yields what counts them. Silent unless `visible`."""
    console = console or Console(stderr=True)
    if not visible:
        yield Advance(description, total, unit, lambda advance, at_once: None)
    elif console.is_terminal:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            TaskProgressColumn(),
            TextColumn("{task.fields[times]}"),
        )
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(description, total=total, times="")

            def update(advance: Advance, at_once: bool) -> None:
                bar.update(
                    task,
                    completed=advance.done,
                    description=advance.description,
                    times=advance.times(),
                )

            yield Advance(description, total, unit, update)
    else:
        yield Advance(description, total, unit, _Lines(console).show)


def duration(seconds: float) -> str:
    """`48 s`, or `3 min` from two minutes on."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


class _Lines:
    """Lines for a log without a terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last_s = time.perf_counter() + _FIRST_LINE_S - _LINE_EVERY_S

    def show(self, advance: Advance, at_once: bool) -> None:
        now_s = time.perf_counter()
        if not at_once and now_s - self._last_s < _LINE_EVERY_S:
            return
        self._last_s = now_s
        if at_once:
            text = f"[{advance.done:.0f}/{advance.total:.0f}, {advance.times()}]"
            text += f" {advance.description}"
        else:
            text = f"{advance.description}: {advance.done:.0f} of {advance.total:.0f}"
            text = f"{text} {advance.unit}".rstrip() + f", {advance.times()}"
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
