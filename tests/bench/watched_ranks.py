"""Ranks for tests of how a run ends: torchrun ... watched_ranks.py FOLDER HOW.

They exchange sums for a minute. HOW is `work`, `finish` (one sum), `raise` (rank 1 fails after some
sums) or `wait` (rank 0 waits in the store, the others too).
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from ranks import Ranks, World, run_ranks


def work(ranks: Ranks) -> None:
    ranks.open_group("gloo", torch.device("cpu"))
    folder, how = Path(sys.argv[1]), sys.argv[2]
    (folder / f"pid{ranks.world.rank}").write_text(str(os.getpid()))
    if how == "wait":
        if ranks.world.rank == 0:
            time.sleep(60)
        ranks.control.barrier()
    deadline_s = time.monotonic() + (60 if how != "finish" else -1)
    number = torch.ones(1)
    while True:
        if ranks.world.size > 1:
            dist.all_reduce(number)
        if how == "raise" and ranks.world.rank == 1 and time.monotonic() > deadline_s - 59:
            raise ValueError("a defect of rank 1")
        if time.monotonic() > deadline_s:
            break
        time.sleep(0.01)


if __name__ == "__main__":
    sys.exit(run_ranks(World(), work, lambda: " Look in runs/x."))
