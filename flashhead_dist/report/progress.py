"""How far a run is: a bar on a terminal, a line a stage elsewhere; on stderr, on one rank."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class SweepProgress:
    """Shows the stages of a sweep; a context manager. Silent where `visible` is false."""

    def __init__(self, num_stages: int, *, visible: bool, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._num_stages = num_stages
        self._num_begun = 0
        self._start_s = time.perf_counter()
        self._visible = visible
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self._console,
            disable=not (visible and self._console.is_terminal),
            transient=True,
        )
        self._task = self._bar.add_task("starting", total=num_stages)

    def stage(self, text: str) -> None:
        """A stage begins; the one before it is done."""
        self._bar.update(self._task, completed=self._num_begun, description=text)
        self._num_begun += 1
        if self._visible and not self._console.is_terminal:
            elapsed_s = time.perf_counter() - self._start_s
            self._console.print(
                f"[{self._num_begun}/{self._num_stages}, {elapsed_s:.0f} s] {text}",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )

    def __enter__(self) -> SweepProgress:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.stop()
