"""One rank of a distributed test: `rank_main.py <folder> <file> <function>`; see conftest.py.

Loads the function from the test file by path, calls it with `(rank, world_size, *arguments)` inside
an open gloo group, and leaves what it returns in the folder.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist


def main() -> None:
    folder, file, function = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    torch.manual_seed(0)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)
    arguments = torch.load(folder / "arguments.pt", weights_only=False)
    dist.init_process_group(
        "gloo",
        # A file needs no free port, which another test could take in between.
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=float(os.environ["RANK_TIMEOUT_S"])),
    )
    result = getattr(module, function)(rank, world_size, *arguments)
    torch.save(result, folder / f"result_{rank}.pt")
    # A rank that leaves early would break a collective that others are still in.
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
