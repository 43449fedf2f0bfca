"""Which steps a CUDA graph may hold, and how one is split; without a GPU, by stand-ins."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from flashhead_dist.heads.registry import HEAD_NAMES
from flashhead_dist.measure import graph
from flashhead_dist.measure.graph import can_capture, capture_note, graphed_step


def head(name: str, *, device: str = "cuda", tp_size: int = 1, capturable: bool = True) -> Any:
    place = SimpleNamespace(device=torch.device(device), tp_size=tp_size, group=None)
    return SimpleNamespace(
        name=name, capturable=capturable, tp=place, forward=lambda states: states.sum()
    )


def test_a_graph_holds_what_never_waits_for_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = "nccl"
    monkeypatch.setattr(graph.dist, "get_backend", lambda group: backend)
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


class _Scripted:
    """Stands for CapturedWork: runs the work, and takes 30 us whole and 22 alone."""

    made: list[_Scripted] = []  # noqa: RUF012

    def __init__(self, work: Callable[[Tensor], object], batch: Tensor) -> None:
        self.us = 22.0 if self.made else 30.0
        self.work, self.seen = work, []
        self.made.append(self)

    def replay_us(self, batch: Tensor) -> float:
        self.work(batch)
        self.seen.append(batch)
        return self.us


@pytest.mark.parametrize(("tp_size", "communication_us"), [(1, 0.0), (2, 8.0)])
def test_communication_is_what_the_step_takes_beyond_its_compute(
    monkeypatch: pytest.MonkeyPatch, tp_size: int, communication_us: float
) -> None:
    flushed: list[int] = []
    monkeypatch.setattr(graph, "CapturedWork", _Scripted)
    monkeypatch.setattr(graph, "record_step", lambda head, batch: "recorded")
    monkeypatch.setattr(graph, "replay_step", lambda head, states, recording: states.sum())
    _Scripted.made.clear()
    batches = [torch.ones(1, 4), torch.zeros(1, 4)]
    step = graphed_step(head("flashhead", tp_size=tp_size), batches, lambda: flushed.append(1))
    assert [step(iteration) for iteration in range(3)] == [(30.0, communication_us)] * 3
    assert len(_Scripted.made) == tp_size
    for captured in _Scripted.made:
        assert [float(batch.sum()) for batch in captured.seen] == [4.0, 0.0, 4.0]
    assert len(flushed) == (3 if tp_size == 2 else 0), "the second replay finds a cold cache too"


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
    assert captured.replay_us(batch) > 0
    torch.testing.assert_close(found[-1], batch @ weight.T)
