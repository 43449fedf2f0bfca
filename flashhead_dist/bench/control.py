"""Agreement between ranks outside the measured collectives: waiting, values, errors, failures.

`Control` speaks through a key-value store (`torch.distributed.Store`), not through a process group:
it works before a group is open, and a rank may wait in it for an hour without any collective timing
out. It is silent on the network while nobody arrives or leaves.

`Watch` ends a rank where it cannot go on. torchrun itself notices a rank that ends, names it and
ends the others of its host; `Watch` adds what torchrun does not see: ranks that stopped, ranks of
other hosts, and signals that come while a rank is stuck in native code.
"""

from __future__ import annotations

import json
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType, TracebackType
from typing import Any

from torch.distributed import Store  # type: ignore[attr-defined]

from flashhead_dist.errors import INTERRUPTED, LOST, UserError

PATIENCE = timedelta(days=2)
"""How long a rank waits for the others: a failed one is noticed by `Watch`, not by a timeout."""

LOST_AFTER_VARIABLE = "FLASHHEAD_LOST_AFTER_S"
_LOST_AFTER_S, _LEAST_LOST_AFTER_S = 20.0, 3.0
_HEARTBEAT_S, _POLL_S = 2.0, 0.25
_GRACE_S = 3.0
"""How long a message stays to be read, and how long the main thread may clean up."""


class PeerError(UserError):
    """A mistake found on one or more ranks, raised on every one of them.

    `first_rank` is the lowest rank that found it: the one that should say so.
    """

    def __init__(self, sentence: str, first_rank: int) -> None:
        super().__init__(sentence)
        self.first_rank = first_rank


class Control:
    """One rank's end of a set of ranks that act in step.

    Every rank of the set makes the same calls in the same order; the keys are numbered by that
    order, so `ranks` and `name` must be the same everywhere.
    """

    def __init__(
        self, store: Store, rank: int, ranks: Sequence[int], name: str = "control"
    ) -> None:
        self.rank = rank
        self.ranks = tuple(ranks)
        self._store = store
        self._name = name
        self._num_calls = 0

    @property
    def is_first(self) -> bool:
        """Whether this rank is the lowest of the set."""
        return self.rank == self.ranks[0]

    def among(self, ranks: Sequence[int], name: str) -> Control:
        """A set of fewer ranks; `name` must be new in this run."""
        return Control(self._store, self.rank, ranks, f"{self._name}/{name}")

    def gather(self, value: Any) -> list[Any]:
        """Every rank's JSON value in the order of `ranks`, on every rank."""
        prefix = self._next_prefix()
        self._store.set(f"{prefix}/{self.rank}", json.dumps(value))
        keys = [f"{prefix}/{rank}" for rank in self.ranks]
        self._store.wait(keys, PATIENCE)
        return [json.loads(self._store.get(key)) for key in keys]

    def broadcast(self, value: Any) -> Any:
        """The first rank's JSON value, on every rank; what the others pass is ignored."""
        key = self._next_prefix()
        if self.is_first:
            self._store.set(key, json.dumps(value))
        self._store.wait([key], PATIENCE)
        return json.loads(self._store.get(key))

    def barrier(self) -> None:
        """Wait for every rank of the set."""
        prefix = self._next_prefix()
        self._store.set(f"{prefix}/{self.rank}", "")
        self._store.wait([f"{prefix}/{rank}" for rank in self.ranks], PATIENCE)

    @contextmanager
    def phase(self) -> Iterator[None]:
        """Run a block on every rank of the set and fail on all of them if it fails on one.

        Only `UserError` is shared: anything else ends this process, which ends the job.

        Raises:
            PeerError: some rank's block raised a `UserError`; its text is the lowest such rank's.
        """
        sentence: str | None = None
        try:
            yield
        except UserError as error:
            sentence = str(error)
        for rank, found in zip(self.ranks, self.gather(sentence), strict=True):
            if found is not None:
                raise PeerError(found, rank)

    def _next_prefix(self) -> str:
        self._num_calls += 1
        return f"{self._name}/{self._num_calls}"


def lost_after_s(environment: Mapping[str, str] = os.environ) -> int:
    """Whole seconds without a heartbeat after which a rank has failed.

    Raises:
        UserError: the environment variable holds no such number.
    """
    text = environment.get(LOST_AFTER_VARIABLE, str(_LOST_AFTER_S))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not _LEAST_LOST_AFTER_S <= seconds < float("inf"):
        raise UserError(
            f"{LOST_AFTER_VARIABLE} is {text!r}: give seconds, {_LEAST_LOST_AFTER_S:g} or more"
        )
    return int(seconds)


class Watch:
    """Heartbeats between ranks, and signals of this one; a context manager.

    A heartbeat is a barrier in the store that all ranks pass every two seconds. A rank that misses
    it is named on every host, and every rank ends with 1. So do they with the message of a rank
    that fails by itself. On SIGINT the main thread gets its KeyboardInterrupt, and the process ends
    with 130 after three seconds at the latest. SIGTERM ends it at once.
    """

    def __init__(
        self,
        store: Store | None,
        rank: int,
        hosts: Sequence[str],
        *,
        parting_words: Callable[[], str] = lambda: "",
        patience_s: int = int(_LOST_AFTER_S),
    ) -> None:
        """store: None for one rank. hosts: names by rank; ranks of one name share a stderr.

        parting_words: what to add to a message, asked for when it is written.
        """
        self._store, self._rank, self._hosts = store, rank, tuple(hosts)
        self._parting_words, self._patience_s = parting_words, patience_s
        self._leaving, self._answered = threading.Event(), threading.Event()
        self._ending, self._said = threading.Lock(), threading.Lock()
        self._threads = [threading.Thread(target=self._on_signals, daemon=True)]
        if store is not None:
            self._threads += [
                threading.Thread(target=work, daemon=True)
                for work in (self._exchange_heartbeats, self._guard_store)
            ]

    def __enter__(self) -> Watch:
        self._signals, self._wakeup = os.pipe()
        os.set_blocking(self._wakeup, False)
        self._old_wakeup = signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
        self._old_term = signal.signal(signal.SIGTERM, _leave_to_the_thread)
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop watching. All ranks leave together, unless one of them fails.

        The failure of a rank shows on the others as some exception of a collective: where one is
        raised, that is waited for, and ends this process.
        """
        if isinstance(error, Exception) and not isinstance(error, UserError) and self._store:
            several_hosts = len(set(self._hosts)) > 1
            self._patience_s = min(self._patience_s, 4)
            time.sleep(3 * _GRACE_S if several_hosts else _GRACE_S)
            if not self._ending.acquire(blocking=False):
                time.sleep(2 * _GRACE_S)
            self._publish(f"{self._name(self._rank)} failed: {type(error).__name__}: {error}")
            if not self._speaks():
                os._exit(LOST)
            if several_hosts:
                time.sleep(_GRACE_S)
        if isinstance(error, KeyboardInterrupt):
            # The main thread may be here before the other has seen the signal.
            self._say_interrupted()
            if len(set(self._hosts)) > 1:
                time.sleep(_GRACE_S)
        self._leaving.set()
        os.write(self._wakeup, b"\0")
        for thread in self._threads:
            thread.join(timeout=_GRACE_S)
        signal.set_wakeup_fd(self._old_wakeup)
        signal.signal(signal.SIGTERM, self._old_term)

    def _name(self, *ranks: int) -> str:
        by_host: dict[str, list[int]] = {}
        for rank in ranks:
            by_host.setdefault(self._hosts[rank], []).append(rank)
        return " and ".join(
            f"{'rank' if len(members) == 1 else 'ranks'} {', '.join(map(str, members))} on {host}"
            for host, members in by_host.items()
        )

    def _exchange_heartbeats(self) -> None:
        number = 0
        try:
            while True:
                number += 1
                done = self._leaving.wait(_HEARTBEAT_S)
                if not self._pass_heartbeat(number, done) or done:
                    return
        except Exception as error:
            if not self._leaving.is_set():
                self._end(f"the run's store failed ({error}): its host ended or is unreachable.")

    def _pass_heartbeat(self, number: int, done: bool) -> bool:
        """Whether to go on: no rank is done."""
        assert self._store is not None
        keys = [f"heartbeat/{number}/{rank}" for rank in range(len(self._hosts))]
        self._store.set(keys[self._rank], "done" if done else "")
        waited_s = 0.0
        while not self._store.check(keys):
            self._read_failure()
            # Time is counted in steps: a pause of the whole job is no failure of a rank.
            time.sleep(_POLL_S)
            waited_s += _POLL_S
            missing = [r for r, key in enumerate(keys) if not self._store.check([key])]
            if missing and waited_s >= self._patience_s:
                self._end(
                    f"{self._name(*missing)} sent no heartbeat for {waited_s:.0f} s: stopped, "
                    f"ended or unreachable."
                )
        self._read_failure()
        if number > 1:
            self._store.delete_key(f"heartbeat/{number - 1}/{self._rank}")
        return b"done" not in self._store.multi_get(keys)

    def _read_failure(self) -> None:
        """End this process where another rank has published why the run ends."""
        assert self._store is not None
        self._answered.set()
        if self._store.check(["failure"]):
            self._end(self._store.get("failure").decode())

    def _guard_store(self) -> None:
        """Notice that the store does not answer: a call to it may block for ever."""
        silent_s = 0
        while not self._leaving.wait(1.0):
            silent_s = 0 if self._answered.is_set() else silent_s + 1
            self._answered.clear()
            if silent_s > self._patience_s + _HEARTBEAT_S:
                self._end(f"the run's store gave no answer for {silent_s} s: its host is stopped.")

    def _on_signals(self) -> None:
        """Read what the signal wake-up pipe gets, whatever the main thread is stuck in."""
        while not self._leaving.is_set():
            numbers = os.read(self._signals, 64)
            if signal.SIGTERM in numbers:
                # torchrun sends it to the others once a rank has failed, and names that rank.
                if self._speaks():
                    say(f"ended by SIGTERM.{self._parting_words()}")
                os._exit(128 + signal.SIGTERM)
            if signal.SIGINT in numbers:
                self._say_interrupted()
                left = select.poll()
                left.register(self._signals, select.POLLIN)
                left.poll(_GRACE_S * 1000)
                os._exit(INTERRUPTED)

    def _say_interrupted(self) -> None:
        if self._speaks():
            say(f"interrupted.{self._parting_words()}")
            self._publish(f"the run was interrupted on {self._hosts[self._rank]}.")

    def _end(self, sentence: str) -> None:
        """End this process, having said why once on its host."""
        if not self._ending.acquire(blocking=False):
            time.sleep(2 * _GRACE_S)
        self._publish(sentence)
        if self._speaks():
            say(f"{sentence}{self._parting_words()}")
        if len(set(self._hosts)) > 1:
            # The host that keeps the store ends with its ranks: the others read it first.
            time.sleep(_GRACE_S)
        os._exit(LOST)

    def _publish(self, sentence: str) -> None:
        """Tell the other hosts, unless one of them has."""
        if (store := self._store) is not None:
            self._ask(lambda: store.compare_set("failure", "", sentence))

    def _speaks(self) -> bool:
        """Whether this rank is the first of its host that has something to say."""
        store = self._store
        if store is None:
            return self._said.acquire(blocking=False)
        count = self._ask(lambda: store.add(f"said/{self._hosts[self._rank]}", 1))
        first_of_host = self._hosts.index(self._hosts[self._rank]) == self._rank
        return first_of_host if count is None else count == 1

    def _ask(self, question: Callable[[], Any]) -> Any:
        """The store's answer, or None where there is none soon."""
        answers: list[Any] = []

        def ask() -> None:
            try:
                answers.append(question())
            except Exception:
                return

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(timeout=_GRACE_S)
        return answers[0] if answers else None


def say(sentence: str) -> None:
    """Write an error's sentence to stderr, whatever the main thread is in the middle of."""
    # One write to the descriptor: the main thread may hold the lock of sys.stderr.
    os.write(2, f"\nerror: {sentence}\n".encode())


def _leave_to_the_thread(signum: int, frame: FrameType | None) -> None:
    """Replace the default action, so that the signal reaches the wake-up pipe instead."""
