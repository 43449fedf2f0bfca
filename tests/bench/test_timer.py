"""The timer: latencies of ranks, the order of calls on CUDA (by stand-ins), graphs, recordings."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from flashhead_dist.bench import timer
from flashhead_dist.bench.split import time_parts
from flashhead_dist.bench.timer import (
    CapturedWork,
    Recording,
    can_capture,
    capture_note,
    compute_step,
    forward_step,
    graphed_compute_step,
    graphed_step,
    record_step,
    step_clock,
    stream_clock,
    summarise,
)
from flashhead_dist.heads.registry import HEADS
from flashhead_dist.parallel import Exchange, Operation, TensorParallel
from flashhead_kernels.timing import HostClock, time_steps
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


def test_latency_is_the_slowest_rank_of_each_iteration() -> None:
    """Each rank is fast on average; every iteration waits for the other one."""
    latency = summarise(
        [[(100.0, 0.0), (900.0, 0.0), (100.0, 0.0)], [(900.0, 0.0), (100.0, 0.0), (800.0, 0.0)]]
    )
    assert latency.median_us == 900.0
    assert latency.num_iterations == 3
    assert latency.compute_us_by_rank == (100.0, 800.0)


def test_waiting_for_a_slower_rank_is_no_communication() -> None:
    """Rank 0 computes 10 us and waits 90 in the collective for rank 1, whose wire time is 5 us."""
    latency = summarise([[(105.0, 95.0)], [(105.0, 5.0)]])
    assert (latency.compute_us, latency.communication_us) == (100.0, 5.0)


def test_percentiles_are_over_iterations() -> None:
    latency = summarise([[(float(value), 0.0) for value in range(101)]])
    assert (latency.p10_us, latency.median_us, latency.p90_us) == (10.0, 50.0, 90.0)


@pytest.mark.parametrize("ranks", [[], [[]], [[(1.0, 0.0)], [(1.0, 0.0), (2.0, 0.0)]]])
def test_ranks_without_the_same_iterations_are_refused(ranks: Any) -> None:
    with pytest.raises(ValueError, match="same number of iterations"):
        summarise(ranks)


def test_every_step_runs_once_a_round_in_an_order_that_rotates() -> None:
    log: list[str] = []

    def step(name: str, iteration: int) -> int:
        log.append(f"{name}{iteration}")
        return iteration

    times = time_steps({name: partial(step, name) for name in "abc"}, 2)
    more = time_steps({name: partial(step, name) for name in "abc"}, 1, first=2)
    assert log == ["a0", "b0", "c0", "b1", "c1", "a1", "c2", "a2", "b2"]
    assert times["b"] + more["b"] == [0, 1, 2]


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
    step = forward_step(head, BATCHES, stream_clock(CPU, head.tp))
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
    step = graphed_step(head, BATCHES, stream_clock(CPU, head.tp))
    with journal.watching() as log:
        assert step(0) == (pytest.approx(250), 0.0)
    assert problem_of(log, ranks_meet=tp_size > 1) is None
    assert log.count(REPLAY) == tp_size, "the whole, and where ranks exchange its compute alone"


def test_work_of_one_rank_alone_meets_nobody(journal: Journal) -> None:
    for make in (compute_step, graphed_compute_step):
        step = make(lambda states: journal.work(), BATCHES, stream_clock(CPU))
        with journal.watching() as log:
            step(0)
        assert problem_of(log, ranks_meet=False) is None


def test_without_nccl_ranks_meet_on_the_host_before_the_reads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    journal = Journal(monkeypatch, backend="gloo")
    head = head_of(journal, 2)
    clock = stream_clock(CPU, head.tp)
    with journal.watching() as log:
        clock.time_us(journal.work)
    assert log[:2] == [HOST_MEETING, READ]
    assert problem_of(log[1:], ranks_meet=False) is None


def test_rounds_that_record_ranges_begin_in_the_same_way(journal: Journal) -> None:
    head = head_of(journal, 2)
    clock = stream_clock(CPU, head.tp)
    with journal.watching() as log:
        time_parts({"head": lambda iteration: journal.work()}, 2, CPU, clock)
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
    clock = stream_clock(CPU)
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


def a_head(name: str, *, device: str = "cuda", tp_size: int = 1, capturable: bool = True) -> Any:
    place = SimpleNamespace(device=torch.device(device), tp_size=tp_size, group=None)
    return SimpleNamespace(
        name=name, capturable=capturable, tp=place, forward=lambda states: states.sum()
    )


def test_a_graph_holds_what_never_waits_for_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = "nccl"
    monkeypatch.setattr(dist, "get_backend", lambda group: backend)
    assert can_capture(a_head("a"))
    assert can_capture(a_head("a", tp_size=2))
    assert not can_capture(a_head("a", device="cpu"))
    assert not can_capture(a_head("a", capturable=False))
    backend = "gloo"
    assert not can_capture(a_head("a", tp_size=2))


def test_the_note_names_both_kinds() -> None:
    heads = [a_head("flashhead"), a_head("faiss", capturable=False)]
    note = capture_note(heads)
    assert note == (
        "Steps of flashhead are replayed as CUDA graphs; those of faiss are launched from Python."
    )
    assert capture_note(heads[:1]) == "Steps of flashhead are replayed as CUDA graphs."
    assert capture_note([a_head("flashhead", device="cpu")]) is None
    assert "flashhead" in HEADS


class _Played:
    """A clock that runs the work: a whole step takes 30 us, its compute alone 22."""

    def __init__(self) -> None:
        self.times_us = itertools.cycle([30.0, 22.0])

    def ready(self) -> None: ...

    def time_us(self, work: Callable[[], object]) -> float:
        work()
        return next(self.times_us)


def test_communication_is_what_the_step_takes_beyond_its_compute(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    replayed: list[float] = []

    class Captured(CapturedWork):
        def replay(self) -> None:
            replayed.append(float(self._input.sum()))

    Journal(monkeypatch)
    monkeypatch.setattr(timer, "CapturedWork", Captured)
    monkeypatch.setattr(timer, "record_step", lambda head, batch: "recorded")
    monkeypatch.setattr(timer, "replay_step", lambda head, states, recording: states.sum())
    batches = [torch.ones(1, 4), torch.zeros(1, 4)]
    step = graphed_step(a_head("flashhead", tp_size=2), batches, _Played())
    assert [step(iteration) for iteration in range(3)] == [(30.0, 8.0)] * 3
    assert replayed == [4.0, 4.0, 0.0, 0.0, 4.0, 4.0], "both on the iteration's batch"
    step = graphed_step(a_head("flashhead"), batches, _Played())
    assert step(0) == (30.0, 0.0)


def test_captured_work_keeps_what_its_graph_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph owns nothing that was allocated before its capture; its memory would be reused."""
    Journal(monkeypatch)
    weights = torch.ones(4, 4)
    weights_alive = weakref.ref(weights)
    captured = CapturedWork(partial(torch.mm, mat2=weights), torch.ones(1, 4))
    del weights
    gc.collect()
    assert weights_alive() is not None
    del captured
    gc.collect()
    assert weights_alive() is None, "and not longer than the graph"


def test_a_replayed_step_keeps_its_recorded_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    Journal(monkeypatch)
    answers_alive = []

    def record(head: Any, batch: Tensor) -> Recording:
        answer = torch.ones(4)
        answers_alive.append(weakref.ref(answer))
        return Recording(((Operation.MAX, answer.nbytes),), (answer,))

    monkeypatch.setattr(timer, "record_step", record)
    monkeypatch.setattr(timer, "replay_step", lambda head, states, seen: seen.answers[0].sum())
    step = graphed_step(a_head("flashhead", tp_size=2), [torch.ones(1, 4)], _Played())
    gc.collect()
    assert answers_alive[0]() is not None
    del step
    gc.collect()
    assert answers_alive[0]() is None


def test_a_recording_keeps_answers_of_its_own() -> None:
    """A collective may answer in a buffer that the next step writes, such as a kernel's keys."""
    buffer = torch.zeros(1, 1)

    def steps(states: Tensor, want: object) -> Any:
        buffer.copy_(states)
        yield Exchange(Operation.MAX, buffer)

    recorded = a_head("flashhead")
    recorded.check, recorded.steps = lambda states, want: None, steps
    recorded.tp.perform = lambda exchange: exchange.tensor
    first = record_step(recorded, torch.full((1, 1), 3.0))
    record_step(recorded, torch.full((1, 1), 7.0))
    assert first.answers[0].item() == 3.0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_captured_step_gives_what_the_step_gives() -> None:
    weight = torch.randn(64, 16, device="cuda")
    found: list[Tensor] = []

    def work(states: Tensor) -> Tensor:
        found.append(states @ weight.T)
        return found[-1]

    captured = CapturedWork(work, torch.zeros(2, 16, device="cuda"))
    batch = torch.randn(2, 16, device="cuda")
    captured.load(batch)
    assert step_clock(batch.device).time_us(captured.replay) > 0
    torch.testing.assert_close(found[-1], batch @ weight.T)
