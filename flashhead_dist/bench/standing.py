"""What the ranks of a run stand on, gathered from all of them."""

from __future__ import annotations

from typing import Any

from flashhead_dist.bench.control import Control
from flashhead_dist.bench.environment import boot_id
from flashhead_dist.bench.setup import Setup
from flashhead_profiles.counters import network_namespace
from flashhead_topology.choices import all_choices, describe_choices
from flashhead_topology.drawing import short_drawing
from flashhead_topology.place import Topology
from flashhead_topology.probe import probe_place
from flashhead_topology.systems import list_systems


def gather_topology(control: Control, setup: Setup) -> Topology:
    """The same description on every rank; every rank of `control` calls it.

    Ranks share a host where they share a kernel and a network namespace.
    """
    host = f"{boot_id()}/{network_namespace()}"
    place = probe_place(
        control.rank, host, setup.placement.device_type, device_index=setup.device.index or 0
    )
    return Topology.gathered(control.gather(place.as_dict()))


def describe_standing(topology: Topology) -> dict[str, Any]:
    """What `environment.json` says of it: the places, a line, and choices with their reasons."""
    return {
        **topology.as_dict(),
        "drawing": short_drawing(topology),
        "choices": describe_choices(all_choices(topology, list_systems())),
    }
