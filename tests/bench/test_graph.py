"""Which steps a CUDA graph may hold, and how one is split; without a GPU, by stand-ins."""

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

from flashhead_dist.bench import graph
from flashhead_dist.bench.alone import Recording, record_step
from flashhead_dist.bench.graph import can_capture, capture_note, graphed_step
from flashhead_dist.bench.timing import StreamClock
from flashhead_dist.heads.registry import HEAD_NAMES
from flashhead_dist.parallel import Exchange, Operation
from tests.bench.cuda_journal import Journal


def head(name: str, *, device: str = "cuda", tp_size: int = 1, capturable: bool = True) -> Any:
    place = SimpleNamespace(device=torch.device(device), tp_size=tp_size, group=None)
    return SimpleNamespace(
        name=name, capturable=capturable, tp=place, forward=lambda states: states.sum()
    )


def test_a_graph_holds_what_never_waits_for_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = "nccl"
    monkeypatch.setattr(dist, "get_backend", lambda group: backend)
    assert can_capture(head("a"))
    assert can_capture(head("a", tp_size=2))
    assert not can_capture(head("a", device="cpu"))
    assert not can_capture(head("a", capturable=False))
    backend = "gloo"
    assert not can_capture(head("a", tp_size=2))


def test_the_note_names_both_kinds() -> None:
    heads = [head("flashhead"), head("faiss", capturable=False)]
    note = capture_note(heads)
    assert note == (
        "Steps of flashhead are replayed as CUDA graphs; those of faiss are launched from Python."
    )
    assert capture_note(heads[:1]) == "Steps of flashhead are replayed as CUDA graphs."
    assert capture_note([head("flashhead", device="cpu")]) is None
    assert "flashhead" in HEAD_NAMES


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

    class Captured(graph.CapturedWork):
        def replay(self) -> None:
            replayed.append(float(self._input.sum()))

    Journal(monkeypatch)
    monkeypatch.setattr(graph, "CapturedWork", Captured)
    monkeypatch.setattr(graph, "record_step", lambda head, batch: "recorded")
    monkeypatch.setattr(graph, "replay_step", lambda head, states, recording: states.sum())
    batches = [torch.ones(1, 4), torch.zeros(1, 4)]
    step = graphed_step(head("flashhead", tp_size=2), batches, _Played())
    assert [step(iteration) for iteration in range(3)] == [(30.0, 8.0)] * 3
    assert replayed == [4.0, 4.0, 0.0, 0.0, 4.0, 4.0], "both on the iteration's batch"
    step = graphed_step(head("flashhead"), batches, _Played())
    assert step(0) == (30.0, 0.0)


def test_captured_work_keeps_what_its_graph_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph owns nothing that was allocated before its capture; its memory would be reused."""
    Journal(monkeypatch)
    weights = torch.ones(4, 4)
    weights_alive = weakref.ref(weights)
    captured = graph.CapturedWork(partial(torch.mm, mat2=weights), torch.ones(1, 4))
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

    monkeypatch.setattr(graph, "record_step", record)
    monkeypatch.setattr(graph, "replay_step", lambda head, states, seen: seen.answers[0].sum())
    step = graphed_step(head("flashhead", tp_size=2), [torch.ones(1, 4)], _Played())
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

    recorded = head("flashhead")
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

    captured = graph.CapturedWork(work, torch.zeros(2, 16, device="cuda"))
    batch = torch.randn(2, 16, device="cuda")
    captured.load(batch)
    assert StreamClock(batch.device).time_us(captured.replay) > 0
    torch.testing.assert_close(found[-1], batch @ weight.T)
