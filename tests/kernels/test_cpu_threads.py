"""Threads of the CPU kernels: how work is shared, and on which cores."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest
import torch

from flashhead_kernels import cpu_threads
from flashhead_kernels.cpu_threads import (
    LARGE_PAGE_BYTES,
    compute_threads,
    empty_on_large_pages,
    share,
)


@pytest.fixture
def two_cores() -> Iterator[list[int]]:
    """Two cores that this thread may run on; it may again when the test ends."""
    own = os.sched_getaffinity(0)
    if len(own) < 2:
        pytest.skip("one core only")
    cpu_threads._pool.cache_clear()
    yield sorted(own)[:2]
    os.sched_setaffinity(0, own)
    cpu_threads._pool.cache_clear()


def cores_at_work() -> dict[tuple[int, int], set[int]]:
    """Which cores each range of two items was free to run on."""
    found = {}

    def work(first: int, last: int) -> None:
        found[first, last] = os.sched_getaffinity(0)

    with compute_threads(2):
        share(2, work)
    return found


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("total", [0, 1, 4, 7])
def test_every_item_is_worked_on_once(threads: int, total: int) -> None:
    done: list[int] = []
    with compute_threads(threads):
        share(total, lambda first, last: done.extend(range(first, last)))
    assert sorted(done) == list(range(total))


def test_a_fault_in_another_thread_is_raised() -> None:
    def work(first: int, _: int) -> None:
        if first > 0:
            raise ZeroDivisionError

    with compute_threads(2), pytest.raises(ZeroDivisionError):
        share(2, work)


def test_a_thread_that_is_bound_to_a_core_does_not_share_it(two_cores: list[int]) -> None:
    # As under vLLM, which binds this thread and each OpenMP thread to a core of its own. Fails
    # where the other threads inherit this one's core, and half of the machine stands idle.
    mine, free = two_cores
    end, bound = threading.Event(), threading.Event()

    def openmp_thread() -> None:
        os.sched_setaffinity(0, {free})
        bound.set()
        end.wait()

    other = threading.Thread(target=openmp_thread)
    other.start()
    bound.wait()
    os.sched_setaffinity(0, {mine})
    try:
        assert cores_at_work() == {(0, 1): {mine}, (1, 2): {free}}
    finally:
        end.set()
        other.join()


def test_unbound_threads_stay_unbound(two_cores: list[int]) -> None:
    own = os.sched_getaffinity(0)
    assert cores_at_work() == {(0, 1): own, (1, 2): own}
    assert os.sched_getaffinity(0) == own


def test_one_core_alone_is_shared(two_cores: list[int]) -> None:
    os.sched_setaffinity(0, {two_cores[0]})
    assert cores_at_work() == {(0, 1): {two_cores[0]}, (1, 2): {two_cores[0]}}


def test_large_and_small_tensors_are_ordinary_tensors() -> None:
    for count in (0, 5, 3 * LARGE_PAGE_BYTES):
        tensor = empty_on_large_pages((count, 2), torch.bfloat16)
        assert tensor.shape == (count, 2)
        assert tensor.is_contiguous()
        tensor.fill_(1.5)
        assert float(tensor.float().sum()) == 3.0 * count
