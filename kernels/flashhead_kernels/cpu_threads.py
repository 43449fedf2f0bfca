"""How many threads this process computes with: torch, and the kernels, which follow torch."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch


@contextlib.contextmanager
def compute_threads(number: int) -> Iterator[None]:
    """Compute with `number` threads inside the block, and with as many as before after it."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, number))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def share(total: int, work: Callable[[int, int], None]) -> None:
    """Run `work(first, last)` over ranges of `total` items, one range a thread."""
    threads = min(torch.get_num_threads(), total)
    if threads <= 1:
        work(0, total)
        return
    bounds = [total * i // threads for i in range(threads + 1)]
    others = [_pool(threads - 1).submit(work, bounds[i], bounds[i + 1]) for i in range(1, threads)]
    work(bounds[0], bounds[1])
    for other in others:
        other.result()


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    cores = itertools.cycle(_cores_for_others(threads))
    return ThreadPoolExecutor(
        threads, thread_name_prefix="flashhead", initializer=_bind, initargs=(cores,)
    )


def _cores_for_others(threads: int) -> list[set[int]]:
    """Where `threads` more threads may run; as this one does, where it has room for them.

    A caller that binds its OpenMP threads to a core each, as vLLM does, binds this thread too, and
    threads that it starts would share its core. They get those of the OpenMP threads.
    """
    own = os.sched_getaffinity(0)
    if len(own) > threads:
        return [own]
    bound: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(ProcessLookupError):  # it ended in the meantime
            cores = os.sched_getaffinity(int(task.name))
            bound |= cores if len(cores) == 1 else set()
    return [{core} for core in sorted(bound - own)] or [own]


def _bind(cores: Iterator[set[int]]) -> None:
    os.sched_setaffinity(0, next(cores))
