"""Choices and their reasons on machines that do not exist.

Mutated to see each fail: atomics not asked for, hosts ignored, islands of one GPU allowed, the
slowest interface taken, a stage for each GPU.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from flashhead_topology.choices import (
    all_choices,
    choose_cores,
    choose_exchange_path,
    choose_interface,
    choose_parallelism,
    choose_system,
    describe_choices,
)
from flashhead_topology.place import Interface, Topology
from flashhead_topology.systems import list_systems
from tests.topology.invented import (
    FOUR_L40,
    H100_NODE,
    LAPTOP,
    MANAGEMENT,
    NDR,
    TWO_NODES,
    h100_places,
    l40_places,
    laptop_places,
)

ONE = Topology(tuple(h100_places(num_ranks=1)))
UNKNOWN_PATHS = Topology(tuple(replace(place, paths=()) for place in h100_places()))


@pytest.mark.parametrize(
    ("topology", "value", "words"),
    [
        (H100_NODE, (8, 1), "all on NVLink (NV18)"),
        (TWO_NODES, (8, 2), "a pipeline stage a host"),
        (FOUR_L40, (2, 2), "2 islands of 2 GPUs"),
        (LAPTOP, (2, 1), "share memory"),
        (ONE, (1, 1), "one rank"),
        (UNKNOWN_PATHS, (8, 1), "what NVML does not tell"),
        (Topology(tuple(l40_places(3))), (3, 1), "joined by PCIe"),
        (Topology((*h100_places("a"), *h100_places("b", 8, 4))), (12, 1), "hosts hold 4, 8 ranks"),
    ],
)
def test_parallelism(topology: Topology, value: tuple[int, int], words: str) -> None:
    choice = choose_parallelism(topology)
    assert choice.value == value
    assert words in choice.reason
    assert value[0] * value[1] == len(topology.places)


@pytest.mark.parametrize(
    ("topology", "value", "words"),
    [
        (H100_NODE, "symmetric", "NV18"),
        (FOUR_L40, "nccl", "no native atomics (2 PIX, 4 SYS)"),
        (TWO_NODES, "nccl", "2 hosts"),
        (LAPTOP, "gloo", "not every rank has a GPU"),
        (ONE, "none", "one rank"),
        (UNKNOWN_PATHS, "nccl", "are not known"),
    ],
)
def test_exchange_path(topology: Topology, value: str, words: str) -> None:
    choice = choose_exchange_path(topology)
    assert choice.value == value
    assert words in choice.reason


def test_one_pair_without_atomics_is_enough_for_the_library() -> None:
    first, *others = h100_places()
    paths = (*first.paths[:-1], replace(first.paths[-1], atomics=False))
    topology = Topology((replace(first, paths=paths), *others))
    assert choose_exchange_path(topology).value == "nccl"


@pytest.mark.parametrize(
    ("topology", "value", "words"),
    [
        (H100_NODE, 14, "4 near NUMA node 0, 4 near NUMA node 1"),
        (FOUR_L40, 16, "2 near NUMA node 0, 2 near NUMA node 1"),
        (TWO_NODES, 14, "8 ranks on 112 cores"),
        (LAPTOP, 4, "2 ranks share 8 cores"),
        (Topology(tuple(laptop_places(9))), 1, "9 ranks of a host take turns on 8 cores"),
    ],
)
def test_cores(topology: Topology, value: int, words: str) -> None:
    choice = choose_cores(topology)
    assert choice.value == value
    assert words in choice.reason


def test_cores_that_are_not_known_are_not_made_up() -> None:
    bare = Topology(tuple(replace(place, cores=()) for place in laptop_places()))
    assert choose_cores(bare).value is None
    nodeless = Topology(tuple(replace(place, numa_nodes=()) for place in laptop_places()))
    assert "not known" in choose_cores(nodeless).reason


def test_the_fastest_interface_that_every_host_has() -> None:
    choice = choose_interface(TWO_NODES)
    assert choice.value == "mlx5_0"
    assert "8 adapters of 400 Gbit/s on every host (InfiniBand), 1 a rank" in choice.reason
    assert choose_interface(H100_NODE).value is None
    lone = [replace(place, interfaces=()) for place in h100_places("b", 8)]
    assert "no network interface" in choose_interface(Topology((*h100_places(), *lone))).reason
    slow = Interface("eno1", "ethernet", 10e9)
    lean = [replace(place, interfaces=(slow,)) for place in h100_places("b", 8)]
    assert choose_interface(Topology((*h100_places(), *lean))).value == "eno1"
    mute = Interface("eth0", "ethernet", None)
    places = [replace(p, interfaces=(mute,)) for p in (*h100_places(), *h100_places("b", 8))]
    assert "no interface tells its speed" in choose_interface(Topology(tuple(places))).reason


def test_gloo_is_given_a_name_that_sockets_know() -> None:
    """An adapter's own name is NCCL's; sockets know its network interface, where it has one."""
    places = [
        replace(p, device_type="cpu", uuid="") for p in (*h100_places(), *h100_places("b", 8))
    ]
    assert choose_interface(Topology(tuple(places))).value == "ib0"
    mute = [
        replace(p, interfaces=(*(replace(i, network_names=()) for i in NDR), MANAGEMENT))
        for p in places
    ]
    assert choose_interface(Topology(tuple(mute))).value == "eno1"


@pytest.mark.parametrize(
    ("topology", "value"),
    [
        (H100_NODE, "h100-infiniband"),
        (TWO_NODES, "h100-infiniband"),
        (FOUR_L40, "l40-ethernet"),
        (LAPTOP, None),
    ],
)
def test_the_nearest_shipped_system(topology: Topology, value: str | None) -> None:
    choice = choose_system(topology, list_systems())
    assert choice.value == value
    assert choice.reason


def test_a_gpu_without_a_shipped_system_is_told() -> None:
    places = [replace(p, device_name="NVIDIA GeForce RTX 4090") for p in h100_places()]
    choice = choose_system(Topology(tuple(places)), list_systems())
    assert choice.value is None
    assert "no system is shipped for 4090, only for a100, b200, h100, h200, l40" in choice.reason


@pytest.mark.parametrize("topology", [H100_NODE, FOUR_L40, TWO_NODES, LAPTOP, ONE, UNKNOWN_PATHS])
def test_every_choice_has_a_reason_of_one_sentence(topology: Topology) -> None:
    choices = all_choices(topology, list_systems())
    assert len({choice.name for choice in choices}) == 5
    for choice in choices:
        assert len(choice.reason) > 10
        assert "\n" not in choice.reason
        assert not choice.reason.endswith(".")
    assert describe_choices(choices)[0]["name"] == "parallelism"
