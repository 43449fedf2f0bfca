"""What the links between these ranks cost: measured, fitted, and kept as a system file.

    torchrun --nproc-per-node 2 launch/calibrate.py                        within one host
    torchrun --nnodes 4 --nproc-per-node 8 --node-rank I --master-addr HOST launch/calibrate.py
    torchrun ... launch/calibrate.py --out systems/lab.yaml --ranks 64 --fit p10

Measures the collectives that heads use from 8 bytes to --largest-bytes: all-reduce (MAX of int64),
all-gather, a message from rank to rank, and on CUDA the exchange through symmetric memory. Once
among the ranks of the first host (level `host`) and once among the first ranks of all hosts (level
`network`), in pairs and all together. Fits latency and bandwidth to each level, and writes the
system with its sources and errors, every point beside the fit as CSV, and a picture. A host whose
link is much slower than the others' is named. docs/guides/several-hosts.md says what is fitted, and
how well.

The file can be given wherever a shipped system can. Ranks must not share cores or GPUs: what they
wait for each other would pass for latency. Exit codes: as of launch/scale.py.
"""

from __future__ import annotations

import argparse
import json
import socket
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from math import inf
from pathlib import Path
from typing import Any

import torch.distributed as dist

from flashhead_dist.bench.control import Control
from flashhead_dist.bench.environment import Setup, decide_setup
from flashhead_dist.bench.links import (
    Point,
    calibrated_system,
    launch_seconds,
    message_sizes,
    time_collectives,
    time_pairs,
)
from flashhead_dist.bench.memory import measure_bandwidth
from flashhead_dist.errors import UserError
from flashhead_dist.parallel import TensorParallel
from flashhead_dist.report.calibration import (
    LevelPoints,
    calibration_table,
    draw_points,
    write_points,
)
from flashhead_dist.report.tables import report_console
from flashhead_topology.links import fit_level
from flashhead_topology.machine import oversubscription
from flashhead_topology.probe import probe_machine
from flashhead_topology.slow_links import slow_links
from flashhead_topology.systems import System, SystemFileError, save_system
from rank_parser import RankParser
from ranks import Ranks, World, refuse_together, run_ranks

_COMMAND = "launch/calibrate.py"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command on this rank and return its exit code."""
    world = World()
    try:
        arguments = _parse(argv, world)
    except UserError as error:
        return refuse_together(world, error)
    return run_ranks(world, lambda ranks: _calibrate(ranks, arguments), lambda: "")


def _parse(argv: Sequence[str] | None, world: World) -> argparse.Namespace:
    parser = RankParser(_COMMAND, speaks=world.rank == 0, description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("calibrated.yaml"), metavar="FILE.yaml")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there")
    parser.add_argument("--name", help="of the system (default: the file's)")
    parser.add_argument(
        "--ranks", type=int, metavar="N", help="that the outermost level joins (default: started)"
    )
    parser.add_argument("--largest-bytes", type=int, default=64 << 20, metavar="N")
    parser.add_argument("--point-seconds", type=float, default=1.0, metavar="S", help="for each")
    parser.add_argument("--fit", choices=("median", "p10"), default="median", help="to which")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda with a GPU a rank")
    parser.add_argument("--skip-plots", action="store_true")
    parser.add_argument("--json", action="store_true", help="one JSON document as the last line")
    arguments = parser.parse_args(argv)
    if world.size < 2:
        raise UserError(
            "links need two ranks or more: start them with torchrun --nproc-per-node 2, or on "
            "several hosts with --nnodes"
        )
    if arguments.out.suffix != ".yaml":
        raise UserError(f"--out is {arguments.out}: give a name that ends in .yaml")
    if arguments.largest_bytes < 64:
        raise UserError(f"--largest-bytes is {arguments.largest_bytes}: give 64 or more")
    if not 0 < arguments.point_seconds < inf:
        raise UserError(f"--point-seconds is {arguments.point_seconds}: give more than 0, finite")
    if arguments.ranks is not None and arguments.ranks < world.size:
        raise UserError(f"--ranks is {arguments.ranks}: give {world.size}, as started, or more")
    return arguments


def _calibrate(ranks: Ranks, arguments: argparse.Namespace) -> None:
    world, control = ranks.world, ranks.control
    with control.phase():
        setup = _decide(arguments, world)
        if control.is_first and arguments.out.exists() and not arguments.overwrite:
            raise UserError(
                f"{arguments.out} is there already: give another name with --out, or --overwrite"
            )
    ranks.open_group(setup.placement.backend, setup.device)
    sizes = message_sizes(arguments.largest_bytes)
    levels: list[LevelPoints] = []
    algorithm = "gloo_ring" if setup.placement.backend == "gloo" else None
    hosts = range(0, world.size, world.local_size)
    notes: list[str] = []
    for name, groups in (
        ("host", [range(world.local_size)]),
        ("network", sorted({tuple(hosts[:2]), tuple(hosts)}, key=len)),
    ):
        points = [
            point
            for members in groups
            if len(members) > 1
            for point in _measure(members, name, ranks, setup, sizes, arguments.point_seconds)
        ]
        if points:
            joined = world.local_size if name == "host" else world.size
            samples = [point.sample(arguments.fit) for point in points]
            fit = fit_level(samples, name=name, ranks=joined, algorithm=algorithm)
            levels.append(LevelPoints(points, fit))
    if len(hosts) > 2:
        notes += _notes_on_links(hosts, ranks, setup)
    (memory,) = _on_group(range(world.local_size), "memory", ranks, setup, _memory)
    with control.phase():
        if control.is_first:
            system = calibrated_system(
                setup,
                [level.fit for level in levels],
                memory,
                name=arguments.name or arguments.out.stem,
                algorithm=algorithm,
                ranks=arguments.ranks or world.size,
                made=f"{_COMMAND} on {setup.machine.host_class}, {datetime.now(UTC):%Y-%m-%d}, "
                f"fitted to the {arguments.fit}",
            )
            _write(system, levels, notes, arguments)


def _decide(arguments: argparse.Namespace, world: World) -> Setup:
    setup = decide_setup(
        probe_machine(),
        local_rank=world.local_rank,
        local_world_size=world.local_size,
        threads_per_rank=1,
        device=arguments.device,
        heads=[],
    )
    num_gpus = len(setup.machine.gpus) if setup.device.type == "cuda" else 0
    shared = oversubscription(world.local_size, setup.machine.num_cores, num_gpus)
    if shared.oversubscribed:
        raise UserError(
            f"{shared.reason} on one host: their turns would pass for latency; start fewer with "
            f"--nproc-per-node"
        )
    return setup


def _measure(
    members: Sequence[int],
    level: str,
    ranks: Ranks,
    setup: Setup,
    sizes: Sequence[int],
    point_seconds: float,
) -> list[Point]:
    """Points of one group, the same on every rank of the world."""

    def time(place: TensorParallel, control: Control) -> list[Any]:
        points = time_collectives(place, control, sizes, point_seconds=point_seconds)
        return [point.as_json() for point in points]

    name = f"{level}-{len(members)}"
    found = _on_group(members, name, ranks, setup, time)
    if setup.device.type == "cuda" and level == "host":
        found += _on_group(members, f"{name}-one-shot", ranks, setup, time, exchange="auto")
    return [Point(**point) for point in found]


def _on_group(
    members: Sequence[int],
    name: str,
    ranks: Ranks,
    setup: Setup,
    work: Any,
    *,
    exchange: str | None = None,
) -> list[Any]:
    """What `work` finds on a group of ranks, told to all ranks of the world."""
    group = dist.new_group(list(members))
    found: list[Any] = []
    if ranks.world.rank in members:
        control = ranks.control.among(members, name)
        backend = exchange or setup.placement.backend
        if len(members) == 1:
            place = TensorParallel.single(setup.device)
        else:
            place = TensorParallel.from_group(group, setup.device, backend)
        if exchange is None or place.exchange_method == "symmetric":
            found = work(place, control)
    return list(ranks.control.broadcast(found))


def _memory(place: TensorParallel, control: Control) -> list[Any]:
    """What `calibrated_system` takes as `memory`."""
    measured = measure_bandwidth(place, control, in_turn=False)
    return [[min(measured.bytes_per_s_by_rank), measured.method, launch_seconds(place.device)]]


def _notes_on_links(hosts: Sequence[int], ranks: Ranks, setup: Setup) -> list[str]:
    def pairs(place: TensorParallel, control: Control) -> list[Any]:
        return [[a, b, seconds] for (a, b), seconds in time_pairs(place, control).items()]

    found = _on_group(hosts, "pairs", ranks, setup, pairs)
    names = ranks.control.gather(socket.gethostname())
    return [
        f"The link of {names[hosts[link.host]]} (rank {hosts[link.host]}) is SLOW: a round trip "
        f"takes {link.seconds * 1e6:,.0f} us with it and {link.others_s * 1e6:,.0f} us among the "
        f"others, {link.factor:.1f} times as long. A ring is as slow as its slowest link."
        for link in slow_links({(a, b): seconds for a, b, seconds in found})
    ]


def _write(
    system: System,
    levels: Sequence[LevelPoints],
    notes: Sequence[str],
    arguments: argparse.Namespace,
) -> None:
    try:
        save_system(system, arguments.out, overwrite=arguments.overwrite)
    except SystemFileError as error:
        raise UserError(str(error)) from error
    points = arguments.out.with_suffix(".csv")
    write_points(levels, points)
    written = [arguments.out, points]
    if not arguments.skip_plots:
        written.append(arguments.out.with_suffix(".png"))
        draw_points(levels, written[-1], arguments.fit)
    console = report_console()
    console.print(calibration_table(levels, arguments.fit))
    for level in system.levels:
        rate = 1e-9 / level.beta_s_per_byte if level.beta_s_per_byte else inf
        console.print(
            f"{level.name}: {level.ranks} ranks, alpha {level.alpha_s * 1e6:.1f} us, "
            f"{rate:.3g} GB/s, base {level.base_s * 1e6:.1f} us"
        )
    for note in notes:
        console.print(note)
    console.print(f"Written: {', '.join(map(str, written))}")
    if arguments.json:
        document = {
            "system": str(arguments.out),
            "levels": [asdict(level.fit.level) for level in levels],
            "mean_relative_error": {
                level.fit.level.name: level.fit.mean_relative_error() for level in levels
            },
            "points": [row for level in levels for row in level.rows()],
            "notes": list(notes),
        }
        print(json.dumps(document, allow_nan=False), flush=True)


if __name__ == "__main__":
    sys.exit(main())
