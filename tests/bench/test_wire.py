"""Bytes counted in a network namespace where nobody else is, and what others do to the count."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import FileStore  # type: ignore[attr-defined]

from flashhead_dist.bench.control import Control
from flashhead_dist.bench.wire import DeviceCount, WireCounter, sum_over_ranks
from flashhead_dist.parallel import (
    Exchange,
    Operation,
    split_tensor_parallel,
)
from flashhead_profiles.counters import MEMORY, NVLINK_SENT, NVLINK_SENT_GPM, PCIE_SENT, Counted
from flashhead_topology.links import ring_sent_bytes

LARGE_BYTES = 1 << 20
RANK_MAIN = Path(__file__).parents[1] / "rank_main.py"


def _rank_count(rank: int, world_size: int, store: str, noisy: bool) -> list[Any]:
    """Count an all-gather of a megabyte, one of eight bytes, and no exchange at all."""
    place = split_tensor_parallel((world_size,))[world_size]
    assert place is not None
    control = Control(FileStore(store, world_size), rank, range(world_size))
    counter = WireCounter(control, "here")
    stop = threading.Event()
    if noisy and rank == 0:
        threading.Thread(target=_chatter, args=(stop,), daemon=True).start()
    large, small = torch.zeros(LARGE_BYTES // 4), torch.zeros(1, dtype=torch.int64)
    steps = (lambda: place.all_gather(large), lambda: place.all_reduce_max(small), lambda: None)
    counted = [counter.count(step, 5, 7) for step in steps]
    stop.set()
    return [(each.per_step, each.reason) for each in counted]


def _rank_count_sizes(rank: int, world_size: int, store: str, sizes: list[int]) -> list[Any]:
    """Count one exchange of every operation and size, beside what a ring sends in all."""
    place = split_tensor_parallel((world_size,))[world_size]
    assert place is not None
    counter = WireCounter(Control(FileStore(store, world_size), rank, range(world_size)), "here")
    found = []
    for operation in Operation:
        dtype = torch.int64 if operation is Operation.MAX else torch.float32
        for size in sizes:
            operand = torch.zeros(size // dtype.itemsize, dtype=dtype)
            exchange = Exchange(operation, operand)
            counted = counter.count(lambda: place.perform(exchange), 5, 7).per_step  # noqa: B023
            analytic = world_size * ring_sent_bytes(operation, operand.nbytes, world_size)
            found.append((operation.value, size, counted, analytic))
    return found


def _chatter(stop: threading.Event) -> None:
    """A steady stream of other traffic over the same interface, about 5 MB/s."""
    receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    receiver.bind(("127.0.0.1", 0))
    sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    while not stop.wait(0.002):
        sender.sendto(b"x" * 10_000, receiver.getsockname())


def _count_in_namespace(folder: Path, given: object, function: str = "_rank_count") -> list[Any]:
    world_size = 2
    torch.save((str(folder / "counter_store"), given), folder / "arguments.pt")
    ranks = " & ".join(
        f"RANK={rank} {sys.executable} {RANK_MAIN} {folder} {__file__} {function}"
        for rank in range(world_size)
    )
    script = f"ip link set lo up && ({ranks} & wait)"
    environment = os.environ | {"WORLD_SIZE": str(world_size), "RANK_TIMEOUT_S": "60"}
    done = subprocess.run(
        ["unshare", "--net", "sh", "-c", script],
        env=environment | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (folder / "result_0.pt").exists(), done.stderr
    results = [torch.load(folder / f"result_{rank}.pt") for rank in range(world_size)]
    assert json.dumps(results[0]) == json.dumps(results[1])
    return list(results[0])


needs_namespace = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("unshare") is None or shutil.which("ip") is None,
    reason="needs root, unshare and ip",
)


@pytest.mark.root
@needs_namespace
def test_counted_bytes_are_the_payload_and_a_little_protocol(tmp_path: Path) -> None:
    (large, _), (small, _), (nothing, _) = _count_in_namespace(tmp_path, False)
    # Each of two ranks sends its operand once.
    assert 2 * LARGE_BYTES <= large < 2 * LARGE_BYTES * 1.03
    # Two steps a rank of 8 bytes, in messages of a few hundred.
    assert 2 * 8 < small < 4000
    assert nothing < 100


@pytest.mark.root
@needs_namespace
def test_other_steady_traffic_is_subtracted(tmp_path: Path) -> None:
    (large, _), _, _ = _count_in_namespace(tmp_path, True)
    assert large == pytest.approx(2 * LARGE_BYTES, rel=0.15)


@pytest.mark.root
@needs_namespace
def test_counted_bytes_are_the_analytic_ones_from_512_kib_on(tmp_path: Path) -> None:
    """And what a small message adds is the protocol's: some hundred bytes, whatever its size.

    Counting an all-gather's received bytes, or an all-reduce's operand once, would be off by half.
    """
    sizes = [8, 256, 512 << 10, 1 << 20, 4 << 20]
    found = _count_in_namespace(tmp_path, sizes, "_rank_count_sizes")
    assert len(found) == 3 * len(sizes)
    for operation, size, counted, analytic in found:
        if size >= 512 << 10:
            assert counted == pytest.approx(analytic, rel=0.03), (operation, size)
        else:
            protocol_bytes = (counted - analytic) / 2
            assert 100 < protocol_bytes < 2000, (operation, size, protocol_bytes)


def test_counts_are_bytes_of_one_step_over_all_ranks_beside_the_analytic_ones() -> None:
    ranks = [
        {NVLINK_SENT: Counted(4000.0), NVLINK_SENT_GPM: Counted(5000.0), MEMORY: Counted(1e9)},
        {NVLINK_SENT: Counted(6000.0), NVLINK_SENT_GPM: Counted(7000.0), MEMORY: Counted(3e9)},
    ]
    links, totals, memory = sum_over_ranks(ranks, 10, sent_bytes=800.0, read_bytes=300)
    assert links == DeviceCount(
        name=NVLINK_SENT, bytes_per_step=1000.0, analytic_bytes_per_step=800.0, reason=None
    )
    assert (totals.name, totals.bytes_per_step) == (NVLINK_SENT_GPM, 1200.0)
    assert totals.analytic_bytes_per_step == 800.0
    assert (memory.bytes_per_step, memory.analytic_bytes_per_step) == (4e8, 300)


def test_a_count_that_one_rank_misses_is_missing_with_its_reason() -> None:
    """Summing what is known would give half of what two ranks sent."""
    ranks = [{PCIE_SENT: Counted(4000.0)}, {PCIE_SENT: Counted(None, "wrapped")}]
    (count,) = sum_over_ranks(ranks, 10, sent_bytes=800.0, read_bytes=300)
    assert (count.bytes_per_step, count.reason) == (None, "wrapped")
