"""This process among the ranks that torchrun started: store, process group, and how a run ends.

Shared by the scripts of this folder. Every rank leaves with an exit code of its own and no
traceback for what a user did: 2 for a mistake in what was given, 1 where another rank was lost, 130
after Ctrl-C. torchrun reports these and itself exits with 1 for any but 0.
"""

from __future__ import annotations

import json
import os
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

from flashhead_dist.errors import UserError
from flashhead_dist.measure.control import Control, PeerError
from flashhead_dist.measure.environment import boot_id
from flashhead_dist.measure.watch import INTERRUPTED, PeerWatch

_COLLECTIVE_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class World:
    """What torchrun says of this process; a world of one where it did not start it."""

    rank: int = field(default_factory=lambda: int(os.environ.get("RANK", "0")))
    size: int = field(default_factory=lambda: int(os.environ.get("WORLD_SIZE", "1")))
    local_rank: int = field(default_factory=lambda: int(os.environ.get("LOCAL_RANK", "0")))
    local_size: int = field(default_factory=lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


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

    parting_words: what to tell a person whose run was ended from outside.
    """
    store = _open_store(world)
    control = Control(store, world.rank, range(world.size))
    places = control.gather([boot_id(), os.getpid()])
    pids = {rank: pid for rank, (host, pid) in enumerate(places) if host == boot_id()}
    try:
        with PeerWatch(world.rank, pids, parting_words):
            try:
                work(Ranks(world, control, store))
            finally:
                if dist.is_initialized():
                    dist.destroy_process_group()
    except PeerError as error:
        # No rank ends while another still watches: it would be taken for lost.
        control.barrier()
        return refuse(error, speaks=error.first_rank == world.rank)
    except KeyboardInterrupt:
        return INTERRUPTED
    control.barrier()
    return 0


def refuse(error: UserError, *, speaks: bool) -> int:
    """Say what is wrong, on the one rank that speaks; returns the exit code."""
    if speaks:
        sys.stdout.flush()
        print(f"error: {error}", file=sys.stderr, flush=True)
        # torchrun ends what it prints with this file's text, as the root cause.
        if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
            said = {"py_callstack": f"error: {error}", "timestamp": str(int(time.time()))}
            document = {"message": {"message": str(error), "extraInfo": said}}
            Path(path).write_text(json.dumps(document))
    return error.exit_code


def _open_store(world: World) -> Store:
    """The store of torchrun's agent, which outlives any rank."""
    if world.size == 1:
        return HashStore()
    store, _, _ = next(rendezvous("env://"))
    return PrefixStore("flashhead", store)
