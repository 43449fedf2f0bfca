"""Agreement between ranks outside the measured collectives: waiting, values, and errors.

It speaks through a key-value store (`torch.distributed.Store`), not through a process group: it
works before a group is open, a rank may wait in it for an hour without any collective timing out,
and it is silent on the network while nobody arrives or leaves.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Protocol

from flashhead_dist.errors import UserError

PATIENCE = timedelta(days=2)
"""How long a rank waits for the others: a dead one is noticed by `PeerWatch`, not by a timeout."""


class KeyValueStore(Protocol):
    """The part of `torch.distributed.Store` used here."""

    def set(self, key: str, value: str, /) -> None:
        """Store `value` under `key` for every rank."""

    def get(self, key: str, /) -> bytes:
        """Return the value under a key that exists."""

    def wait(self, keys: list[str], timeout: timedelta, /) -> None:
        """Block until all keys exist."""


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
        self, store: KeyValueStore, rank: int, ranks: Sequence[int], name: str = "control"
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
