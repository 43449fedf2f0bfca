"""Messages between threads that stand for pipeline stages: by rendezvous, on clocks of their own.

A message passes when both its sides have posted it. What a stage then waits for is the transport's
`Wait`; when every stage waits for something that cannot happen, all of them get `DeadlockError`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

import torch
from torch import Tensor


class Wait(Enum):
    """What stops a stage, besides waiting for what it receives."""

    FOR_NOTHING = auto()
    """As over gloo."""
    AT_SENDS = auto()
    """A send returns when the message has passed."""
    AT_POSTS = auto()
    """So does the posting of a receive: NCCL making a communicator, or under a log that waits."""
    AT_COMPUTE = auto()
    """The end of each compute waits for all messages that the stage has posted, either way."""


class DeadlockError(Exception):
    """No stage can go on."""


@dataclass
class Message:
    """One message; times are of the virtual clocks at posting."""

    sent_s: float | None = None
    received_s: float | None = None
    content: Tensor | None = None
    target: Tensor | None = None

    @property
    def passed(self) -> bool:
        return self.sent_s is not None and self.received_s is not None

    @property
    def passed_s(self) -> float:
        assert self.sent_s is not None
        assert self.received_s is not None
        return max(self.sent_s, self.received_s)


@dataclass
class Transport:
    """All stages' messages. `clock_s`: of each stage; messages themselves take no time."""

    pp_size: int
    wait: Wait
    clock_s: list[float] = field(init=False)

    def __post_init__(self) -> None:
        self.clock_s = [0.0] * self.pp_size
        self._changed = threading.Condition()
        self._messages: dict[tuple[Any, ...], Message] = {}
        self._num_posts: dict[tuple[Any, ...], int] = {}
        self._posted: list[list[Message]] = [[] for _ in range(self.pp_size)]
        self._blockers: dict[int, list[Message]] = {}
        self._num_running = self.pp_size

    def send(self, kind: str, source: int, target: int, content: Tensor) -> Posted:
        return self._post(source, ("send", kind, source, target), content)

    def receive(self, kind: str, source: int, target: int, into: Tensor) -> Posted:
        return self._post(target, ("receive", kind, source, target), into)

    def _post(self, stage: int, side: tuple[str, str, int, int], tensor: Tensor) -> Posted:
        with self._changed:
            number = self._num_posts[side] = self._num_posts.get(side, -1) + 1
            message = self._messages.setdefault((*side[1:], number), Message())
            if side[0] == "send":
                message.sent_s, message.content = self.clock_s[stage], tensor.clone()
            else:
                message.received_s, message.target = self.clock_s[stage], tensor
            self._posted[stage].append(message)
            self._changed.notify_all()
        blocking = {Wait.AT_SENDS: ("send",), Wait.AT_POSTS: ("send", "receive")}
        if side[0] in blocking.get(self.wait, ()):
            self.wait_for(stage, [message])
        return Posted(self, stage, message, tensor)

    def compute(self, stage: int, seconds: float) -> None:
        self.clock_s[stage] += seconds

    def wait_for_posted(self, stage: int) -> None:
        """What a device-wide synchronization does over NCCL."""
        self.wait_for(stage, self._posted[stage])

    def wait_for(self, stage: int, messages: Sequence[Message]) -> None:
        with self._changed:
            self._blockers[stage] = list(messages)
            self._changed.notify_all()
            while not all(message.passed for message in messages):
                if self._stuck():
                    raise DeadlockError
                self._changed.wait()
            del self._blockers[stage]
            for message in messages:
                self.clock_s[stage] = max(self.clock_s[stage], message.passed_s)

    def leave(self, stage: int) -> None:
        """This stage has ended, well or not."""
        with self._changed:
            self._num_running -= 1
            self._blockers.pop(stage, None)
            self._changed.notify_all()

    def _stuck(self) -> bool:
        """Whether all stages that have not ended wait for messages that have not passed."""
        waiting = [
            not all(message.passed for message in blockers) for blockers in self._blockers.values()
        ]
        return sum(waiting) == self._num_running


@dataclass
class Posted:
    """As `pipeline_stage.Posted`."""

    transport: Transport
    stage: int
    message: Message
    tensor: Tensor

    def wait(self) -> None:
        self.transport.wait_for(self.stage, [self.message])
        if self.message.target is self.tensor:
            assert self.message.content is not None
            self.tensor.copy_(self.message.content)


class ThreadLinks:
    """As `pipeline_stage.Links`, for one of the threads."""

    def __init__(self, transport: Transport, stage: int) -> None:
        self.transport = transport
        self.stage = stage
        self.pp_size = transport.pp_size

    def send_hidden(self, hidden: Tensor) -> Posted:
        return self.transport.send("hidden", self.stage, self.stage + 1, hidden)

    def expect_hidden(self, shape: Sequence[int], dtype: torch.dtype) -> Posted:
        into = torch.empty(tuple(shape), dtype=dtype)
        return self.transport.receive("hidden", self.stage - 1, self.stage, into)

    def send_tokens(self, token_ids: Tensor) -> list[Posted]:
        return [
            self.transport.send("tokens", self.stage, target, token_ids)
            for target in range(self.pp_size - 1)
        ]

    def expect_tokens(self, shape: Sequence[int]) -> Posted:
        into = torch.empty(tuple(shape), dtype=torch.int64)
        return self.transport.receive("tokens", self.pp_size - 1, self.stage, into)


def run_stages(transport: Transport, run: Callable[[ThreadLinks], Any]) -> list[Any]:
    """Each stage's result of `run`; raises the first error, a `DeadlockError` included."""
    results: list[Any] = [None] * transport.pp_size
    errors: list[BaseException] = []

    def run_one(stage: int) -> None:
        try:
            results[stage] = run(ThreadLinks(transport, stage))
        except BaseException as error:
            errors.append(error)
        finally:
            transport.leave(stage)

    threads = [threading.Thread(target=run_one, args=(s,)) for s in range(transport.pp_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads)
    return results
