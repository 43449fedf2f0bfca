"""A step captured in a CUDA graph: head and exchange as a decoder replays them.

Nothing is launched from Python, allocated or waited for inside a replay. Events cannot split one,
so the step's compute is captured a second time, with recorded answers in place of the exchanges,
and what the whole step takes beyond that is communication.

A graph holds addresses and owns only what was allocated while it was captured. What its work read
besides (weights, recorded answers, words of a symmetric exchange) lives through `CapturedWork`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flashhead_dist.bench.alone import record_step, replay_step
from flashhead_dist.bench.timing import Clock, Step, in_step_range, meets_on_stream
from flashhead_dist.heads.base import Head

_WARM_UPS = 3


def can_capture(head: Head) -> bool:
    """Whether the head's step and its exchanges work without the host."""
    if head.tp.device.type != "cuda" or not head.capturable:
        return False
    return meets_on_stream(head.tp)


def capture_note(heads: Sequence[Head]) -> str | None:
    """A sentence that says which heads replay a graph; None where there is no GPU."""
    if not any(head.tp.device.type == "cuda" for head in heads):
        return None
    names = {way: [h.name for h in heads if can_capture(h) is way] for way in (True, False)}
    replayed = f"Steps of {', '.join(names[True]) or 'no head'} are replayed as CUDA graphs"
    if not names[False]:
        return f"{replayed}."
    return f"{replayed}; those of {', '.join(names[False])} are launched from Python."


def graphed_step(head: Head, batches: Sequence[Tensor], clock: Clock) -> Step:
    """A step of `head` on the iteration's batch `[B, D]`; every rank of the group calls it.

    Raises:
        RuntimeError: the step cannot be captured.
    """
    whole = CapturedWork(head.forward, batches[0])
    alone: CapturedWork | None = None
    if head.tp.tp_size > 1:
        recording = record_step(head, batches[0])
        alone = CapturedWork(lambda states: replay_step(head, states, recording), batches[0])

    def step(iteration: int) -> tuple[float, float]:
        batch = batches[iteration % len(batches)]
        whole.load(batch)
        wall_us = clock.time_us(in_step_range(whole.replay, iteration))
        if alone is None:
            return wall_us, 0.0
        alone.load(batch)
        return wall_us, max(0.0, wall_us - clock.time_us(alone.replay))

    return step


def graphed_compute_step(
    work: Callable[[Tensor], object], batches: Sequence[Tensor], clock: Clock
) -> Step:
    """A step of `work`, which exchanges nothing, on the iteration's batch `[B, D]`.

    Raises:
        RuntimeError: the work cannot be captured.
    """
    captured = CapturedWork(work, batches[0])

    def step(iteration: int) -> tuple[float, float]:
        captured.load(batches[iteration % len(batches)])
        return clock.time_us(captured.replay), 0.0

    return step


class CapturedWork:
    """`work(hidden_states [B, D])` in a CUDA graph, captured on a stream that it ran on before.

    It keeps `work`, and with it all tensors that the graph reads, as long as the graph.
    """

    def __init__(self, work: Callable[[Tensor], object], batch: Tensor) -> None:
        self._work = work
        self._input = batch.clone()
        current = torch.cuda.current_stream(batch.device)
        stream = torch.cuda.Stream(batch.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                work(self._input)
        stream.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=stream):
            self._output = work(self._input)
        current.wait_stream(stream)

    def load(self, batch: Tensor) -> None:
        """Queue a copy of `batch [B, D]` to where the graph reads its hidden states."""
        self._input.copy_(batch)

    def replay(self) -> None:
        """Queue the graph on the current stream."""
        self._graph.replay()
