"""Steps of heads for the one timer of `flashhead_kernels.timing`, and latencies from their times.

A step is one `forward` on every rank of the group, in one of three ways: as it is, from a CUDA
graph, or *replayed* on one rank with the recorded answers of its exchanges. A head's part on one
rank is a generator that yields its exchanges, so `record_step` runs it once with real collectives
and keeps their answers, and `replay_step` computes exactly what the rank computes among the others,
while all of them sleep.

The ranks meet before each step. What they differ by when they leave the meeting is part of the
step, so a latency is an upper bound by that skew.

Letters: R ranks of the group, N iterations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from flashhead_dist.heads.base import Head, Want
from flashhead_dist.parallel import Exchange, Operation, TensorParallel, meet_on_stream
from flashhead_kernels.timing import Clock, HostClock, StreamClock, capture
from flashhead_profiles.ranges import STEP, annotate

Step = Callable[[int], tuple[float, float]]
"""Takes the iteration's number, returns (wall, communication) in microseconds on this rank."""
Times = Sequence[tuple[float, float]]
"""What a step returned, by iteration."""


@dataclass(frozen=True)
class Latency:
    """What one head's step took over all ranks.

    Per iteration: the step takes as long as its slowest rank; `compute` is that of the rank that
    computes longest, and `communication` the rest. Waiting for a slower rank is thus neither. All
    are medians over iterations, so that compute and communication add up to the median only nearly.
    """

    median_us: float
    p10_us: float
    p90_us: float
    compute_us: float
    communication_us: float
    compute_us_by_rank: tuple[float, ...]
    num_iterations: int


def summarise(ranks: Sequence[Times]) -> Latency:
    """Reduce the R ranks' times of the same N iterations.

    Raises:
        ValueError: no rank, no iteration, or ranks that differ in their number of iterations.
    """
    if not ranks or len({len(times) for times in ranks}) != 1 or not len(ranks[0]):
        raise ValueError("every rank needs the same number of iterations, one or more")
    wall, communication = np.moveaxis(np.array(ranks), 2, 0)  # [R, N] each
    compute = wall - communication
    slowest = wall.max(axis=0)
    longest_compute = compute.max(axis=0)
    p10, median, p90 = np.percentile(slowest, (10, 50, 90))
    return Latency(
        median_us=float(median),
        p10_us=float(p10),
        p90_us=float(p90),
        compute_us=float(np.median(longest_compute)),
        communication_us=float(np.median(slowest - longest_compute)),
        compute_us_by_rank=tuple(float(c) for c in np.median(compute, axis=1)),
        num_iterations=wall.shape[1],
    )


def step_clock(device: torch.device, tp: TensorParallel | None = None) -> Clock:
    """The clock of a device. tp: the group whose ranks meet before each piece of work, if any."""
    if device.type == "cuda":
        return stream_clock(device, tp)
    return HostClock() if tp is None or tp.tp_size == 1 else HostClock(tp.barrier)


def stream_clock(device: torch.device, tp: TensorParallel | None = None) -> StreamClock:
    """The clock of a GPU: ranks meet on its stream where their collectives are queued there."""
    if tp is None or tp.tp_size == 1:
        return StreamClock(device)
    if not meets_on_stream(tp):
        return StreamClock(device, meet_on_host=tp.barrier)
    token = torch.zeros(1, dtype=torch.float32, device=device)
    return StreamClock(device, meet_on_stream=partial(meet_on_stream, token, tp.group))


def meets_on_stream(tp: TensorParallel) -> bool:
    """Whether collectives of the group are queued on the GPU's stream, without the host."""
    return tp.tp_size == 1 or dist.get_backend(tp.group) == "nccl"


def forward_step(head: Head, batches: Sequence[Tensor], clock: Clock) -> Step:
    """A step of `head` on the iteration's batch `[B, D]`, the batches taken in turn."""
    tp: TensorParallel = head.tp
    compute = compute_step(head.forward, batches, clock)

    def step(iteration: int) -> tuple[float, float]:
        tp.reset()
        wall_us, _ = compute(iteration)
        return wall_us, tp.communication_s * 1e6

    return step


def compute_step(work: Callable[[Tensor], object], batches: Sequence[Tensor], clock: Clock) -> Step:
    """A step of `work` on the iteration's batch; its communication is given as 0."""

    def step(iteration: int) -> tuple[float, float]:
        batch = batches[iteration % len(batches)]
        return clock.time_us(_in_step_range(partial(work, batch), iteration)), 0.0

    return step


def _in_step_range(work: Callable[[], object], iteration: int) -> Callable[[], None]:
    """`work` within the range that profiles know a step by, without what a clock does before."""

    def run() -> None:
        with annotate(STEP, iteration):
            work()

    return run


@dataclass(frozen=True)
class Recording:
    """One step's exchanges on one rank: what was asked, and what the group answered.

    exchanges: operation and bytes that this rank gave, in order. answers: copies, since the step's
    own tensors may be written again by the next one.
    """

    exchanges: tuple[tuple[Operation, int], ...]
    answers: tuple[Tensor, ...]


def record_step(head: Head, hidden_states: Tensor) -> Recording:
    """Run one step of `head` on `hidden_states [B, D]` with the group; every rank calls it."""
    exchanges: list[tuple[Operation, int]] = []
    answers: list[Tensor] = []

    def perform(exchange: Exchange) -> Tensor:
        exchanges.append((exchange.operation, exchange.tensor.nbytes))
        answer = head.tp.perform(exchange)
        answers.append(answer.clone())
        return answer

    _drive(head, hidden_states, perform)
    return Recording(tuple(exchanges), tuple(answers))


def replay_step(head: Head, hidden_states: Tensor, recording: Recording) -> None:
    """Run the step of a recording again on this rank, with the recorded answers.

    Raises:
        RuntimeError: the head asks for other exchanges than it did when recorded.
    """
    num_answered = 0

    def answer(exchange: Exchange) -> Tensor:
        nonlocal num_answered
        asked = (exchange.operation, exchange.tensor.nbytes)
        if recording.exchanges[num_answered : num_answered + 1] != (asked,):
            raise RuntimeError(f"{head.name} asks for another exchange than when recorded: {asked}")
        num_answered += 1
        return recording.answers[num_answered - 1]

    _drive(head, hidden_states, answer)
    if num_answered != len(recording.exchanges):
        raise RuntimeError(f"{head.name} asks for fewer exchanges than when recorded")


def _drive(head: Head, hidden_states: Tensor, answer: Callable[[Exchange], Tensor]) -> None:
    """What `Head.forward` does, with `answer` in the place of the group."""
    want = Want()
    head.check(hidden_states, want)
    steps = head.steps(hidden_states, want)
    try:
        exchange = next(steps)
        while True:
            exchange = steps.send(answer(exchange))
    except StopIteration:
        return


def can_capture(head: Head) -> bool:
    """Whether the head's step and its exchanges work without the host."""
    return head.tp.device.type == "cuda" and head.capturable and meets_on_stream(head.tp)


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
    """A step of `head` from a CUDA graph, as a decoder replays it; every rank calls it.

    Nothing is launched from Python, allocated or waited for inside a replay. Events cannot split
    one, so the step's compute is captured a second time, with recorded answers in place of the
    exchanges, and what the step takes beyond that is communication.

    Raises:
        RuntimeError: the step cannot be captured.
    """
    step_graph = CapturedWork(head.forward, batches[0])
    compute_graph: CapturedWork | None = None
    if head.tp.tp_size > 1:
        recording = record_step(head, batches[0])
        compute_graph = CapturedWork(
            lambda states: replay_step(head, states, recording), batches[0]
        )

    def step(iteration: int) -> tuple[float, float]:
        batch = batches[iteration % len(batches)]
        step_graph.load(batch)
        wall_us = clock.time_us(_in_step_range(step_graph.replay, iteration))
        if compute_graph is None:
            return wall_us, 0.0
        compute_graph.load(batch)
        return wall_us, max(0.0, wall_us - clock.time_us(compute_graph.replay))

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
    """`work(hidden_states [B, D])` in a CUDA graph.

    A graph holds addresses and owns only what was allocated while it was captured. What its work
    read besides (weights, recorded answers, words of a symmetric exchange) lives through `work`.
    """

    def __init__(self, work: Callable[[Tensor], object], batch: Tensor) -> None:
        self._work = work
        self._input = batch.clone()
        self._replay, self._results = capture([partial(work, self._input)], batch.device)

    def load(self, batch: Tensor) -> None:
        """Queue a copy of `batch [B, D]` to where the graph reads its hidden states."""
        self._input.copy_(batch)

    def replay(self) -> None:
        """Queue the graph on the current stream."""
        self._replay()
