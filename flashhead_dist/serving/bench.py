"""Servers with either head take turns under the same load.

Both servers of a `tp_size` are up at once, and the one whose turn it is not is frozen (SIGSTOP):
it holds its memory and takes no time. In a round every concurrency is served by every head; the
order of the heads turns around from round to round, so that a drift of the machine falls on both.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from flashhead_dist.serving.client import Load, Served, run_client
from flashhead_dist.serving.records import HEADS
from flashhead_dist.serving.server import Server, ServerOptions

_WARM_TOKENS = 8


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured: `rounds` calls of the client a head, `tp_size` and concurrency.

    least_requests: of a call; see `Load.of`.
    """

    prompts: tuple[str, ...]
    new_tokens: int
    least_requests: int
    tp_sizes: tuple[int, ...]
    concurrencies: tuple[int, ...]
    rounds: int

    @property
    def num_calls(self) -> int:
        """Of the client that are measured."""
        return len(self.tp_sizes) * len(self.concurrencies) * len(HEADS) * self.rounds

    def load(self, concurrency: int) -> Load:
        """What a call at this concurrency sends."""
        return Load.of(self.prompts, self.new_tokens, concurrency, self.least_requests)


@dataclass(frozen=True)
class Turn:
    """One call of the client: which head at which size, in which round."""

    head: str
    tp_size: int
    concurrency: int
    number: int


def turns(plan: Plan, tp_size: int) -> list[Turn]:
    """All calls at one `tp_size`, in their order."""
    return [
        Turn(head, tp_size, concurrency, number)
        for number in range(plan.rounds)
        for concurrency in plan.concurrencies
        for head in (HEADS if number % 2 == 0 else HEADS[::-1])
    ]


def run_bench(
    plan: Plan,
    options: Callable[[str, int], ServerOptions],
    folder: Path,
    *,
    measured: Callable[[Turn, Served], None],
    stage: Callable[[str], None],
) -> None:
    """Measure everything of the plan.

    Args:
        options: how to start the server of a head and `tp_size`.
        folder: of the run; what servers print goes to `server-<head>-tp<size>.log` in it.
        measured: called with what each turn found, as soon as it is there.
        stage: told what begins.

    Raises:
        UserError: a server does not start, or a call fails. No server is left running.
    """
    for tp_size in plan.tp_sizes:
        with ExitStack() as stack:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            servers = _start(plan, tp_size, options, folder, scratch, stack, stage)
            for turn in turns(plan, tp_size):
                stage(
                    f"{turn.head}, tp {tp_size}, concurrency {turn.concurrency}, "
                    f"round {turn.number + 1} of {plan.rounds}"
                )
                measured(turn, _serve(servers[turn.head], plan.load(turn.concurrency), scratch))


def _start(
    plan: Plan,
    tp_size: int,
    options: Callable[[str, int], ServerOptions],
    folder: Path,
    scratch: Path,
    stack: ExitStack,
    stage: Callable[[str], None],
) -> dict[str, Server]:
    """One server a head, warm and frozen; each starts with the machine to itself."""
    servers: dict[str, Server] = {}
    warm_up = Load.of(plan.prompts, _WARM_TOKENS, max(plan.concurrencies), 1)
    for head in HEADS:
        stage(f"starting the server of {head}, tp {tp_size}")
        server = Server(options(head, tp_size), folder / f"server-{head}-tp{tp_size}.log")
        servers[head] = stack.enter_context(server)
        server.wait_ready()
        run_client(server, warm_up, scratch)
        server.freeze()
    return servers


def _serve(server: Server, load: Load, scratch: Path) -> Served:
    server.thaw()
    try:
        return run_client(server, load, scratch)
    finally:
        server.freeze()
