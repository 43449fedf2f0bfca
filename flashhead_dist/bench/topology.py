"""The hardware of all ranks, gathered, described and drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flashhead_dist.bench.control import Control
from flashhead_dist.bench.environment import Setup, boot_id
from flashhead_dist.bench.records import cannot_write
from flashhead_profiles.counters import network_namespace
from flashhead_topology.drawing import short_drawing, text_drawing, write_picture
from flashhead_topology.hardware import Topology
from flashhead_topology.probe import probe_rank

TEXT_NAME = "topology.txt"
PICTURE_NAME = "topology.png"


def gather_topology(control: Control, setup: Setup) -> Topology:
    """The same description on every rank; a collective call.

    Ranks share a host if they share a kernel and a network namespace.
    """
    host = f"{boot_id()}/{network_namespace()}"
    rank = probe_rank(
        control.rank, host, setup.placement.device_type, device_index=setup.device.index or 0
    )
    return Topology.gathered(control.gather(rank.as_dict()))


def describe_topology(topology: Topology) -> dict[str, Any]:
    """What `environment.json` holds of it."""
    return {**topology.as_dict(), "drawing": short_drawing(topology)}


def write_topology(topology: Topology, folder: Path, *, picture: bool) -> list[Path]:
    """Write the text and, if asked for, the picture; return their paths.

    Raises:
        UserError: the folder cannot be written.
    """
    paths = [folder / TEXT_NAME]
    try:
        paths[0].write_text(f"{short_drawing(topology)}\n\n{text_drawing(topology)}", "utf-8")
        if picture:
            paths.append(folder / PICTURE_NAME)
            write_picture(topology, paths[-1])
    except OSError as error:
        raise cannot_write(paths[-1], error) from error
    return paths
