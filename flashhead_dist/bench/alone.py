"""A rank's compute measured alone: what ranks that share a core cannot show together.

A head's part on one rank is a generator that yields its exchanges. `record_step` runs it once with
the real collectives and keeps what they answered; `replay_step` runs it again with those answers,
so one rank computes exactly what it computes among the others while all of them sleep.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from flashhead_dist.bench.timing import HostClock, Step
from flashhead_dist.heads.base import Head, Want
from flashhead_dist.parallel import Exchange, Operation


@dataclass(frozen=True)
class Recording:
    """One step's exchanges on one rank: what was asked, and what the group answered."""

    exchanges: tuple[tuple[Operation, int], ...]
    """Operation and bytes that this rank gave, in order."""
    answers: tuple[Tensor, ...]
    """Copies: the step's own tensors may be written again by the next one."""


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
    """Run the step of a recording again on this rank alone, with the recorded answers.

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


def alone_step(head: Head, batches: Sequence[Tensor], recordings: Sequence[Recording]) -> Step:
    """A step without communication, for `timing.time_interleaved`; CPU only.

    `recordings[i]` is that of `batches[i]`.
    """
    clock = HostClock()

    def step(iteration: int) -> tuple[float, float]:
        index = iteration % len(batches)
        return clock.time_us(partial(replay_step, head, batches[index], recordings[index])), 0.0

    return step
