"""A step on CUDA is timed on the GPU: the order of calls on stand-ins, and wrong orders."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from flashhead_dist.bench import split_timing
from flashhead_dist.bench.graph import graphed_compute_step, graphed_step
from flashhead_dist.bench.timing import (
    HostClock,
    StreamClock,
    compute_step,
    forward_step,
    step_clock,
)
from flashhead_dist.parallel import Exchange, Operation, TensorParallel
from tests.bench.cuda_journal import (
    HOST_MEETING,
    L2_BYTES,
    READ,
    REPLAY,
    START,
    STOP,
    STREAM_MEETING,
    WORK,
    Journal,
    problem_of,
)

CPU = torch.device("cpu")
BATCHES = [torch.ones(1, 4), torch.zeros(1, 4)]


@pytest.fixture
def journal(monkeypatch: pytest.MonkeyPatch) -> Journal:
    return Journal(monkeypatch)


def head_of(journal: Journal, tp_size: int) -> Any:
    """A head whose step is one piece of work and, on several ranks, one exchange."""

    def steps(states: torch.Tensor, want: object) -> Any:
        journal.work()
        if tp_size > 1:
            yield Exchange(Operation.MAX, states)
        return states

    tp = TensorParallel(tp_size=tp_size)
    tp.perform = lambda exchange: exchange.tensor  # type: ignore[method-assign]
    return SimpleNamespace(
        name="head",
        tp=tp,
        check=lambda states, want: None,
        steps=steps,
        forward=lambda states: tp.run(steps(states, None)),
    )


@pytest.mark.parametrize("tp_size", [1, 2])
def test_an_eager_step_is_queued_behind_reads_and_the_meeting(
    journal: Journal, tp_size: int
) -> None:
    head = head_of(journal, tp_size)
    step = forward_step(head, BATCHES, StreamClock(CPU, head.tp))
    with journal.watching() as log:
        assert step(0)[0] == pytest.approx(250)  # events speak in milliseconds
        step(1)
    assert problem_of(log, ranks_meet=tp_size > 1) is None
    assert log.count(WORK) == 2


@pytest.mark.parametrize("tp_size", [1, 2])
def test_a_replayed_step_and_its_compute_alone_are_queued_alike(
    journal: Journal, tp_size: int
) -> None:
    head = head_of(journal, tp_size)
    step = graphed_step(head, BATCHES, StreamClock(CPU, head.tp))
    with journal.watching() as log:
        assert step(0) == (pytest.approx(250), 0.0)
    assert problem_of(log, ranks_meet=tp_size > 1) is None
    assert log.count(REPLAY) == tp_size, "the whole, and where ranks exchange its compute alone"


def test_work_of_one_rank_alone_meets_nobody(journal: Journal) -> None:
    for make in (compute_step, graphed_compute_step):
        step = make(lambda states: journal.work(), BATCHES, StreamClock(CPU))
        with journal.watching() as log:
            step(0)
        assert problem_of(log, ranks_meet=False) is None


def test_without_nccl_ranks_meet_on_the_host_before_the_reads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    journal = Journal(monkeypatch, backend="gloo")
    head = head_of(journal, 2)
    clock = StreamClock(CPU, head.tp)
    with journal.watching() as log:
        clock.time_us(journal.work)
    assert log[:2] == [HOST_MEETING, READ]
    assert problem_of(log[1:], ranks_meet=False) is None


def test_rounds_that_record_ranges_begin_in_the_same_way(journal: Journal) -> None:
    head = head_of(journal, 2)
    clock = StreamClock(CPU, head.tp)
    with journal.watching() as log:
        split_timing.time_parts({"head": lambda iteration: journal.work()}, 2, CPU, clock)
    quiet = [entry for entry in log if entry != READ]
    assert quiet == [STREAM_MEETING, WORK] * 2
    assert log[0] == READ


def _timed(journal: Journal, *before: Callable[[], object]) -> None:
    """Two events around work, and what comes before them."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for action in before:
        action()
    start.record()
    journal.work()
    stop.record()
    stop.synchronize()


def test_orders_that_time_the_host_or_a_write_back_are_found(journal: Journal) -> None:
    scratch = torch.zeros(2 * L2_BYTES, dtype=torch.uint8)
    wide = scratch.view(torch.int32)
    token = torch.zeros(1)

    def read() -> None:
        wide.sum()

    def meet() -> None:
        dist.all_reduce(token)

    orders: dict[str, tuple[Callable[[], object], ...]] = {
        "good": (read, read, meet),
        "flush by writing, then wait, then a barrier": (
            scratch.zero_, torch.cuda.synchronize, dist.barrier,
        ),
        "flush by writing": (scratch.zero_, meet),
        "a barrier of the hosts": (read, dist.barrier),
        "the GPU is idle when the start event is recorded": (read, meet, torch.cuda.synchronize),
        "the reads come after the meeting": (meet, read),
        "no meeting": (read,),
        "a warm cache": (meet,),
    }  # fmt: skip
    for name, before in orders.items():
        with journal.watching() as log:
            _timed(journal, *before)
        assert (problem_of(log, ranks_meet=True) is None) == (name == "good"), name
    with journal.watching() as log:
        _timed(journal, read, meet)
    assert problem_of([entry for entry in log if entry != STOP], ranks_meet=True) is not None
    swapped = [{START: WORK, WORK: START}.get(entry, entry) for entry in log]
    assert problem_of(swapped, ranks_meet=True) is not None


def test_reads_outlast_a_launch_and_exceed_the_cache(journal: Journal) -> None:
    clock = StreamClock(CPU)
    with journal.watching() as log:
        clock.ready()
    # 128 MiB at 8 TB/s, a B200's, are 17 us; launching a step from Python takes 100 to 150.
    assert len(log) * 17 > 150
    assert clock._scratch.nbytes >= 2 * L2_BYTES


def test_on_a_cpu_the_ranks_meet_on_the_host_before_the_clock_starts() -> None:
    order: list[str] = []
    clock = HostClock(lambda: order.append("meet"))
    assert clock.time_us(lambda: order.append("work")) > 0
    assert order == ["meet", "work"]
    assert isinstance(step_clock(CPU, TensorParallel.single()), HostClock)
