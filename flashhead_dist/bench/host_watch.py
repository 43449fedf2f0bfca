"""Ends the ranks of every host once one host is lost or stands still, and says which.

`PeerWatch` sees the processes of its own host only. Across hosts a rank that is gone shows as some
error of the backend that names no rank, and one that stands still as nothing at all until a
collective times out. So where a run has several hosts every rank leaves a mark in the store once a
second, and the first rank of each host looks whether the marks of all others change. Whoever finds
one lost leaves a sentence in the store, so that all hosts say the same.

The store lives on one host; that one is lost when the store does not answer.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol

from flashhead_dist.bench.watch import LOST, say
from flashhead_dist.errors import UserError

LOST_AFTER_VARIABLE = "FLASHHEAD_LOST_AFTER_S"
_LOST_AFTER_S = 60.0
_LEAST_LOST_AFTER_S = 3.0
_BEAT_S = 1.0
_LINGER_S = 3.0
"""The sentence stays to be read for so long: the host that keeps the store ends with its ranks."""
_SUSPECT_AFTER_S = 4.0
"""A rank is taken for lost sooner where a connection broke."""
_LOST_KEY, _DONE = "lost", "done"


class BeatStore(Protocol):
    """The part of `torch.distributed.Store` used here; it may block for ever."""

    def set(self, key: str, value: str, /) -> None:
        """Store `value` under `key` for every rank."""

    def get(self, key: str, /) -> bytes:
        """Return the value under a key that exists."""

    def multi_get(self, keys: list[str], /) -> list[bytes]:
        """Return the values under keys that exist."""

    def check(self, keys: list[str], /) -> bool:
        """Whether all keys exist."""


def lost_after_s(environment: Mapping[str, str] = os.environ) -> float:
    """Seconds of silence after which a rank of another host is lost.

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
    return seconds


@dataclass(frozen=True)
class Place:
    """Where one rank runs: `space` is the same for ranks that can watch each other's process."""

    space: str
    host: str = field(default_factory=socket.gethostname)


@dataclass
class Marks:
    """When the marks of the others last changed, by this rank's own clock; hosts share none."""

    places: Sequence[Place]
    _values: dict[int, str] = field(default_factory=dict)
    _changed_s: dict[int, float] = field(default_factory=dict)

    def update(self, values: Mapping[int, str], now_s: float) -> None:
        """Take down what every rank's mark says now."""
        for rank, value in values.items():
            if self._values.get(rank) != value:
                self._values[rank], self._changed_s[rank] = value, now_s

    def forgive(self, seconds: float) -> None:
        """Leave out a time in which this rank itself did not run."""
        self._changed_s = {rank: since + seconds for rank, since in self._changed_s.items()}

    def silent(self, now_s: float, after_s: float) -> dict[int, float]:
        """Seconds of silence by rank, once one of them is silent for longer than `after_s`.

        Ranks of a host that stopped together left their last marks within a beat or so: they are
        named together. A rank that is done is not expected to speak.
        """
        silence_s = {
            rank: now_s - since_s
            for rank, since_s in self._changed_s.items()
            if self._values[rank] != _DONE
        }
        if max(silence_s.values(), default=0.0) <= after_s:
            return {}
        about_s = after_s - 1.5 * _BEAT_S
        return {rank: seconds for rank, seconds in silence_s.items() if seconds > about_s}

    def describe(self, silent: Mapping[int, float]) -> str:
        """One sentence that names the silent ranks by host."""
        hosts: dict[str, list[int]] = {}
        for rank in sorted(silent):
            hosts.setdefault(self.places[rank].host, []).append(rank)
        named = " and ".join(
            f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks))} on {host}"
            for host, ranks in hosts.items()
        )
        # Marks of one host seldom stop at once: the shortest silence is true of all.
        seconds = min(silent.values())
        return (
            f"{named} gave no sign for {seconds:.0f} s: the host stands still, is lost or cannot "
            f"be reached, so the run stops."
        )


class HostWatch:
    """Watches the other hosts of a run from one rank; a context manager.

    store: a connection of its own, since it may block for ever; None where all ranks are on one
        host, and nothing is watched then.
    store_place: how a person finds the host that keeps the store.
    silence: called before this rank ends for the loss of another, so that its end is not reported
        as a loss by those beside it.
    """

    def __init__(
        self,
        store: BeatStore | None,
        rank: int,
        places: Sequence[Place],
        *,
        store_place: str,
        parting_words: Callable[[], str],
        silence: Callable[[], None],
        lost_after_s: float,
    ) -> None:
        self._store, self._rank, self._places = store, rank, list(places)
        beside = [r for r, place in enumerate(places) if place.space == places[rank].space]
        self._speaks = rank == min(beside)
        self._others = [r for r in range(len(places)) if r not in beside]
        self._store_place, self._parting_words = store_place, parting_words
        self._silence, self._lost_after_s = silence, lost_after_s
        self._marks = Marks(self._places)
        self._unmarked = set(self._others)
        self._lock, self._ending = threading.Lock(), threading.Lock()
        self._stop = threading.Event()
        self._answered_s = time.monotonic()
        self._broken: Exception | None = None
        self._threads = [
            threading.Thread(target=work, name=f"host-watch-{work.__name__}", daemon=True)
            for work in (self._beat, self._guard)
        ]

    def __enter__(self) -> HostWatch:
        if self._store is not None and self._others:
            self._answered_s = time.monotonic()
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop watching; where a connection broke, first see whether a host is behind it."""
        if not self._threads[0].is_alive():
            return
        if isinstance(error, Exception) and not isinstance(error, UserError):
            self._find_who_broke(error)
        self._stop.set()
        self._threads[0].join(timeout=_LINGER_S)

    def announce(self, sentence: str) -> None:
        """Tell the other hosts why this one's ranks end; returns soon, whatever the store does."""
        if self._store is None or not self._others:
            return
        teller = threading.Thread(target=self._leave, args=(sentence,), daemon=True)
        teller.start()
        teller.join(timeout=_LINGER_S)

    def _leave(self, sentence: str) -> None:
        assert self._store is not None
        try:
            if not self._store.check([_LOST_KEY]):
                self._store.set(_LOST_KEY, sentence)
        except Exception:
            # The store is lost too, and the others find that out by themselves.
            return

    def _beat(self) -> None:
        """Leave marks and read those of others, until told to stop or the store is lost."""
        assert self._store is not None
        number = 0
        try:
            while not self._stop.is_set():
                number += 1
                self._exchange_marks(str(number))
                self._stop.wait(_BEAT_S)
            self._store.set(f"mark/{self._rank}", _DONE)
        except Exception as error:
            self._broken = error

    def _exchange_marks(self, mark: str) -> None:
        assert self._store is not None
        self._store.set(f"mark/{self._rank}", mark)
        if self._store.check([_LOST_KEY]):
            self._end(self._store.get(_LOST_KEY).decode(), announce=False)
        values: dict[int, str] = {}
        if self._speaks:
            # Ranks that have not begun to watch have left no mark yet.
            self._unmarked -= {r for r in self._unmarked if self._store.check([f"mark/{r}"])}
            known = [r for r in self._others if r not in self._unmarked]
            found = self._store.multi_get([f"mark/{r}" for r in known]) if known else []
            values = {r: value.decode() for r, value in zip(known, found, strict=True)}
        with self._lock:
            self._answered_s = time.monotonic()
            self._marks.update(values, self._answered_s)

    def _guard(self) -> None:
        """Notice silence; the beating thread may be stuck in the store."""
        looked_s = time.monotonic()
        while not self._stop.wait(_BEAT_S / 2):
            missed_s = time.monotonic() - looked_s - _BEAT_S / 2
            looked_s = time.monotonic()
            if missed_s > _BEAT_S:
                # This process was stopped, or kept from running: the silence was its own.
                with self._lock:
                    self._answered_s += missed_s
                    self._marks.forgive(missed_s)
                continue
            self._judge(self._lost_after_s)

    def _judge(self, after_s: float) -> None:
        now_s = time.monotonic()
        with self._lock:
            unanswered_s = now_s - self._answered_s
            # Only marks read since can tell; those of a store that does not answer are old.
            silent = self._marks.silent(self._answered_s, after_s)
        if self._broken is not None or unanswered_s > after_s:
            how = "broke off" if self._broken else f"gave no sign for {unanswered_s:.0f} s"
            self._end(
                f"the run's store on {self._store_place} {how}: its host stands still, is lost or "
                f"cannot be reached, so the run stops.",
                announce=False,
            )
        elif silent:
            self._end(self._marks.describe(silent), announce=True)

    def _find_who_broke(self, error: Exception) -> None:
        deadline_s = time.monotonic() + 2 * _SUSPECT_AFTER_S
        while time.monotonic() < deadline_s:
            self._judge(_SUSPECT_AFTER_S)
            time.sleep(_BEAT_S / 4)

    def _end(self, sentence: str, *, announce: bool) -> None:
        """End this process, having said why where it is the one to say so on its host."""
        if not self._ending.acquire(blocking=False):
            # Another thread does, and may have found another reason.
            time.sleep(2 * _LINGER_S)
        self._silence()
        if self._speaks:
            say(f"{sentence}{self._parting_words()}")
        if announce:
            self.announce(sentence)
        if self._speaks:
            time.sleep(_LINGER_S)
        os._exit(LOST)
