"""This process among the ranks that torchrun started: store, process group, and how a run ends.

Shared by the scripts of this folder. Every rank leaves with an exit code of its own and no
traceback for what a user did: 2 for a mistake in what was given, 1 where another rank was lost, 130
after Ctrl-C. torchrun reports these and itself exits with 1 for any but 0.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import HashStore, PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from flashhead_dist.bench.control import Control, PeerError, Watch, lost_after_s
from flashhead_dist.errors import INTERRUPTED, UserError

_COLLECTIVE_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class World:
    """What torchrun says of this process; a world of one where it did not start it."""

    rank: int = field(default_factory=lambda: int(os.environ.get("RANK", "0")))
    size: int = field(default_factory=lambda: int(os.environ.get("WORLD_SIZE", "1")))
    local_rank: int = field(default_factory=lambda: int(os.environ.get("LOCAL_RANK", "0")))
    local_size: int = field(default_factory=lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    num_hosts: int = field(default_factory=lambda: int(os.environ.get("GROUP_WORLD_SIZE", "1")))


@dataclass(frozen=True)
class Ranks:
    """The ranks of a run once they have met; `control` speaks to all of them."""

    world: World
    control: Control
    _store: Store

    def open_group(self, backend: str, device: torch.device) -> None:
        """Open the process group, where there is more than one rank."""
        if self.world.size == 1:
            return
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group(
            backend,
            store=PrefixStore("process-group", self._store),
            rank=self.world.rank,
            world_size=self.world.size,
            timeout=_COLLECTIVE_TIMEOUT,
            device_id=device if device.type == "cuda" else None,
        )


def run_ranks(world: World, work: Callable[[Ranks], None], parting_words: Callable[[], str]) -> int:
    """Do `work` on this rank while watching the others; returns the exit code.

    Where `work` fails among several ranks, the process ends here, with that code.

    parting_words: what to tell a person whose run was ended from outside.
    """
    store = _open_store(world)
    control = Control(store, world.rank, range(world.size))
    code = 0
    try:
        with control.phase():
            patience_s = lost_after_s()
        host = f"{socket.gethostname()}" if world.num_hosts > 1 else "this host"
        watch = Watch(
            PrefixStore("watch", store.clone()) if world.size > 1 else None,  # type: ignore[attr-defined]
            world.rank,
            control.gather(host),
            parting_words=parting_words,
            patience_s=patience_s,
        )
        try:
            with watch:
                work(Ranks(world, control, store))
                # No rank leaves while another still works.
                control.barrier()
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
    except PeerError as error:
        _refuse(error, world)
        code = error.exit_code
        control.barrier()
    except KeyboardInterrupt:
        code = INTERRUPTED
    if code and world.size > 1:
        # Taking Python down lasts longer on some ranks, and torchrun kills those left behind.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def refuse_together(world: World, mistake: UserError) -> int:
    """End a run whose ranks all found the same mistake; one says so. Returns the exit code."""

    def refuse(ranks: Ranks) -> None:
        with ranks.control.phase():
            raise mistake

    return run_ranks(world, refuse, lambda: "")


def _refuse(error: PeerError, world: World) -> None:
    """Say what is wrong, on the one rank that speaks, and let torchrun say it as root cause."""
    speaks = world.rank == error.first_rank
    sentence = f"error: {error}"
    if speaks:
        sys.stdout.flush()
        print(sentence, file=sys.stderr, flush=True)
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        # torchrun ends what it prints with the text of the earliest second.
        second = int(time.time()) + (not speaks)
        said = sentence if speaks else f"ended for what rank {error.first_rank} says"
        extra = {"py_callstack": said, "timestamp": str(second)}
        Path(path).write_text(json.dumps({"message": {"message": said, "extraInfo": extra}}))


def _open_store(world: World) -> Store:
    """The store of torchrun's agent, which outlives any rank."""
    if world.size == 1:
        return HashStore()
    store, _, _ = next(rendezvous("env://"))
    return PrefixStore("flashhead", store)
