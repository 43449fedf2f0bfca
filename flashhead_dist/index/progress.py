"""How far a build is: a bar for each stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

Report = Callable[[str, float], None]
"""Called with a stage's name and the share of it that is done, from 0 to 1."""


class Counter:
    """Adds up the shares of a stage that are reported one by one."""

    def __init__(self, report: Report, stage: str) -> None:
        self._report, self._stage, self._done = report, stage, 0.0

    def __call__(self, share: float) -> None:
        self._done += share
        self._report(self._stage, min(1.0, self._done))


@contextmanager
def progress_bars(show: bool) -> Iterator[Report]:
    """A bar per stage on stderr: live on a terminal, one line a finished stage elsewhere."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description:<32}"), BarColumn(), TimeElapsedColumn())
    live = show and console.is_terminal
    with Progress(*columns, console=console, disable=not live) as bars:
        tasks: dict[str, TaskID] = {}
        finished: set[str] = set()

        def report(stage: str, done: float) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=1.0)
            bars.update(tasks[stage], completed=done)
            if show and not live and done >= 1 - 1e-9 and stage not in finished:
                finished.add(stage)
                console.print(f"{stage}: done", markup=False, highlight=False)

        yield report
