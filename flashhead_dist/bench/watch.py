"""Ends a rank as soon as another one dies or a signal comes, whatever its main thread is stuck in.

A thread sleeps in `poll` on one process file descriptor a peer and on the signal wake-up pipe, so
it costs nothing while all is well. It is needed because a rank blocked in a collective or in the
store runs no Python signal handler, and because gloo's own error names no rank.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
from collections.abc import Callable, Mapping
from types import FrameType, TracebackType

from flashhead_dist.errors import UserError

INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 + SIGINT."""

LOST = 1
"""Exit code of a rank that ends because another one was lost."""

_GRACE_S = 3.0
_SETTLE_MS = 100


class PeerWatch:
    """Watches the processes of the other ranks on this host; a context manager.

    pids: process id by rank, this host's ranks only, this one included.
    parting_words: what to add to the message, asked for when it is written.
    tell: given the message without them, to pass on to other hosts.

    On the death of a peer the lowest rank left says which, and every rank exits with 1. On SIGINT
    the lowest rank says so, the main thread gets its KeyboardInterrupt, and the process ends with
    130 after `_GRACE_S` at the latest. SIGTERM ends it at once, in silence among several ranks:
    torchrun sends it to the rest after one has said why.
    """

    def __init__(
        self,
        rank: int,
        pids: Mapping[int, int],
        parting_words: Callable[[], str] | None = None,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        self._rank = rank
        self._ranks = sorted(pids)
        self._pids = dict(pids)
        self._parting_words = parting_words or (lambda: "")
        self._tell = tell or (lambda sentence: None)
        self._silenced = False
        self._thread = threading.Thread(target=self._watch, name="peer-watch", daemon=True)

    def __enter__(self) -> PeerWatch:
        self._stop_read, self._stop_write = os.pipe()
        self._signal_read, signal_write = os.pipe()
        os.set_blocking(signal_write, False)
        self._peers = {
            os.pidfd_open(pid): rank for rank, pid in self._pids.items() if rank != self._rank
        }
        self._old_wakeup = signal.set_wakeup_fd(signal_write, warn_on_full_buffer=False)
        self._old_term = signal.signal(signal.SIGTERM, _leave_to_the_thread)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop watching; peers may end from now on.

        A peer's death shows in a collective as some exception of the backend, maybe before it shows
        here: on one that is nobody's mistake, a death is waited for, and ends this process.
        """
        if isinstance(error, Exception) and not isinstance(error, UserError):
            self._thread.join(timeout=_GRACE_S)
        os.write(self._stop_write, b"x")
        self._thread.join()
        signal.set_wakeup_fd(self._old_wakeup)
        signal.signal(signal.SIGTERM, self._old_term)
        if isinstance(error, KeyboardInterrupt):
            # The main thread was here before the watching one had seen the signal.
            self._tell_interrupt()

    def silence(self) -> None:
        """From now on end without a word: why has been said already."""
        self._silenced = True

    def _watch(self) -> None:
        poll = select.poll()
        for descriptor in (self._stop_read, self._signal_read, *self._peers):
            poll.register(descriptor, select.POLLIN)
        while True:
            ready = {descriptor for descriptor, _ in poll.poll()}
            if self._stop_read in ready:
                return
            if self._signal_read in ready:
                self._on_signal()
                continue
            self._on_death({self._peers[descriptor] for descriptor in ready})

    def _on_signal(self) -> None:
        numbers = os.read(self._signal_read, 64)
        if signal.SIGTERM in numbers:
            if len(self._ranks) == 1:
                say(f"ended by SIGTERM.{self._parting_words()}")
            os._exit(128 + signal.SIGTERM)
        if signal.SIGINT in numbers:
            self._interrupted()

    def _interrupted(self) -> None:
        self._tell_interrupt()
        # The main thread cleans up if it can; poll doubles as a sleep that __exit__ can end.
        stopped = select.poll()
        stopped.register(self._stop_read, select.POLLIN)
        stopped.poll(_GRACE_S * 1000)
        os._exit(INTERRUPTED)

    def _tell_interrupt(self) -> None:
        if self._rank == self._ranks[0] and not self._silenced:
            say(f"interrupted.{self._parting_words()}")
            self._tell(f"the run was interrupted on {socket.gethostname()}.")

    def _on_death(self, dead: set[int]) -> None:
        # A signal to the whole job, or an orderly end, shows first as the exit of a faster peer.
        settle = select.poll()
        settle.register(self._signal_read, select.POLLIN)
        settle.register(self._stop_read, select.POLLIN)
        ready = {descriptor for descriptor, _ in settle.poll(_SETTLE_MS)}
        if self._stop_read in ready:
            return
        if self._signal_read in ready and signal.SIGINT in os.read(self._signal_read, 64):
            self._interrupted()
        speaks = self._rank == min(rank for rank in self._ranks if rank not in dead)
        if speaks and not self._silenced:
            names = " and ".join(f"rank {rank} (pid {self._pids[rank]})" for rank in sorted(dead))
            say(f"{names} ended before the run did, so the run stops.{self._parting_words()}")
            self._tell(f"{names} on {socket.gethostname()} ended before the run did, so it stops.")
        os._exit(LOST)


def _leave_to_the_thread(signum: int, frame: FrameType | None) -> None:
    """Replace the default action, so that the signal reaches the wake-up pipe instead."""


def say(sentence: str) -> None:
    """Write an error's sentence to stderr, whatever the main thread is in the middle of."""
    # One write to the descriptor: the main thread may hold the lock of sys.stderr.
    os.write(2, f"\nerror: {sentence}\n".encode())
