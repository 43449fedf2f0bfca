"""What a rank says of what it stands on: from files as the kernel writes them, and from NVML.

Mutated to see each fail: interfaces that are down kept, a bridge's port kept, an adapter listed
twice, every active link counted for each peer, NVML left open.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flashhead_topology import probe
from flashhead_topology.hardware import Interface, RankHardware, Topology
from flashhead_topology.probe import (
    numa_node_of_pci,
    numa_nodes_of,
    parse_cpu_list,
    read_gpu_links,
    read_interfaces,
)
from tests.topology.invented import (
    FOUR_L40,
    H100_NODE,
    LAPTOP,
    TWO_NODES,
    FakeNvml,
    NvmlError,
    h100_places,
)

COMMON = {"switch": 10, "switches": 20, "host_bridge": 30, "node": 40, "system": 50}


def interface(root: Path, name: str, **facts: str) -> Path:
    folder = root / "class/net" / name
    folder.mkdir(parents=True)
    for fact, value in ({"type": "1", "operstate": "up", "speed": "-1"} | facts).items():
        (folder / fact).write_text(f"{value}\n")
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """`/sys` of an invented server of two NUMA nodes."""
    for node, cpus in enumerate(("0-3,8-11", "4-7,12-15")):
        folder = tmp_path / f"devices/system/node/node{node}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(cpus + "\n")
    interface(tmp_path, "lo", type="772", operstate="unknown")
    (interface(tmp_path, "ens1", speed="100000") / "device").mkdir()
    interface(tmp_path, "bond0", speed="50000", uevent="INTERFACE=bond0\nDEVTYPE=bond")
    interface(tmp_path, "ens2", speed="25000", operstate="down")
    interface(tmp_path, "veth0", speed="10000")
    (interface(tmp_path, "docker0") / "bridge").mkdir()
    (interface(tmp_path, "port0", speed="10000") / "master").write_text("")
    interface(tmp_path, "ib0", type="32", speed="400000")
    adapter = tmp_path / "class/infiniband/mlx5_0"
    (adapter / "ports/1").mkdir(parents=True)
    (adapter / "device/net/ib0").mkdir(parents=True)
    (adapter / "device/numa_node").write_text("1\n")
    for fact, value in {
        "state": "4: ACTIVE",
        "rate": "400 Gb/sec (4X NDR)",
        "link_layer": "InfiniBand",
    }.items():
        (adapter / "ports/1" / fact).write_text(f"{value}\n")
    gpu = tmp_path / "bus/pci/devices/0000:1b:00.0"
    gpu.mkdir(parents=True)
    (gpu / "numa_node").write_text("1\n")
    return tmp_path


@pytest.mark.parametrize(
    ("text", "cpus"),
    [("0-3,8", (0, 1, 2, 3, 8)), ("5\n", (5,)), ("", ()), ("0-1,4-5", (0, 1, 4, 5))],
)
def test_cpu_lists(text: str, cpus: tuple[int, ...]) -> None:
    assert parse_cpu_list(text) == cpus


def test_numa_nodes(root: Path) -> None:
    assert numa_nodes_of([0, 1], root) == (0,)
    assert numa_nodes_of([3, 4], root) == (0, 1)
    assert numa_nodes_of([99], root) == ()
    assert numa_node_of_pci("00000000:1B:00.0", root) == 1
    assert numa_node_of_pci("00000000:99:00.0", root) is None
    (root / "bus/pci/devices/0000:1b:00.0/numa_node").write_text("-1\n")
    assert numa_node_of_pci("00000000:1B:00.0", root) is None


def test_interfaces_are_the_adapters_that_work(root: Path) -> None:
    assert read_interfaces(root) == (
        Interface("mlx5_0", "infiniband", 400e9, "InfiniBand", 1, ("ib0",)),
        Interface("ens1", "ethernet", 100e9, network_names=("ens1",)),
        Interface("bond0", "ethernet", 50e9, network_names=("bond0",)),
        Interface("veth0", "ethernet", None, network_names=("veth0",)),
    )


def test_an_inactive_adapter_is_no_way_out(root: Path) -> None:
    (root / "class/infiniband/mlx5_0/ports/1/state").write_text("1: DOWN\n")
    names = [item.name for item in read_interfaces(root)]
    assert names == ["ens1", "bond0", "ib0", "veth0"]


def test_nothing_is_known_of_an_empty_root(tmp_path: Path) -> None:
    assert read_interfaces(tmp_path) == ()
    place = probe.probe_rank(0, "a", "cpu", root=tmp_path)
    assert place.interfaces == place.numa_nodes == ()
    assert set(place.missing) == {"interfaces", "numa_nodes"}
    assert all(len(reason) > 20 for reason in place.missing.values())


def test_this_machine_says_what_it_is() -> None:
    place = probe.probe_rank(3, "here", "cpu")
    assert place.rank == 3
    assert place.cores
    assert place.device_name
    assert "speed" in place.missing or any(item.bits_per_s for item in place.interfaces)


def test_nvlink_through_switches() -> None:
    nvml = FakeNvml(8, nvlinks=18)
    links = read_gpu_links(nvml, "GPU-2")
    assert len(links.paths) == 7
    assert {(path.kind, path.num_links, path.atomics) for path in links.paths} == {
        ("nvlink", 18, True)
    }
    assert links.pcie == (5, 16)
    assert (links.missing, nvml.open) == ({}, 0)


def test_nvlink_between_gpus_directly() -> None:
    """Of 12 links of each of four GPUs, four go to each of the others."""
    links = read_gpu_links(FakeNvml(4, nvlinks=12, switched=False), "GPU-0")
    assert [(path.peer, path.num_links) for path in links.paths] == [
        ("GPU-1", 4),
        ("GPU-2", 4),
        ("GPU-3", 4),
    ]


@pytest.mark.parametrize("kind", COMMON)
def test_paths_over_pcie(kind: str) -> None:
    nvml = FakeNvml(2, ancestors={(0, 1): COMMON[kind]})
    (path,) = read_gpu_links(nvml, "GPU-1").paths
    assert (path.peer, path.kind, path.num_links, path.atomics) == ("GPU-0", kind, 0, False)


def test_what_nvml_does_not_tell_is_missing_with_its_reason() -> None:
    refused = ("nvmlDeviceGetTopologyCommonAncestor", "nvmlDeviceGetCurrPcieLinkWidth")
    nvml = FakeNvml(3, ancestors={}, refuses=refused)
    links = read_gpu_links(nvml, "GPU-0")
    assert (links.paths, links.pcie) == ((), None)
    assert set(links.missing) == {"paths", "pcie"}
    assert "is not supported" in links.missing["pcie"]
    assert nvml.open == 0


def test_atomics_that_are_not_told_are_unknown() -> None:
    nvml = FakeNvml(2, ancestors={(0, 1): 50}, refuses=("nvmlDeviceGetP2PStatus",))
    assert read_gpu_links(nvml, "GPU-0").paths[0].atomics is None


def test_a_gpu_that_nvml_does_not_know_is_an_error_and_nvml_is_closed() -> None:
    nvml = FakeNvml(2)
    with pytest.raises(NvmlError):
        read_gpu_links(nvml, "GPU-9")
    assert nvml.open == 0


def probed_gpu(monkeypatch: pytest.MonkeyPatch, root: Path, nvml: Any) -> RankHardware:
    monkeypatch.setattr(probe, "_cuda_device", lambda index: ("NVIDIA H100", f"GPU-{index}"))
    monkeypatch.setattr(probe, "import_module", lambda name: nvml)
    return probe.probe_rank(1, "a", "cuda", 0, root=root)


def test_a_gpu_rank_says_where_its_gpu_is(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    place = probed_gpu(monkeypatch, root, FakeNvml(2, nvlinks=18))
    assert (place.uuid, place.numa_nodes, place.pcie) == ("GPU-0", (1,), (5, 16))
    assert place.paths[0].peer == "GPU-1"
    assert place.missing == {}


def test_a_gpu_rank_without_a_driver_says_why(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    place = probed_gpu(monkeypatch, root, FakeNvml(2, refuses=("nvmlInit",)))
    assert (place.paths, place.pcie, place.numa_nodes) == ((), None, ())
    assert "nvmlInit is not supported" in place.missing["paths"]


@pytest.mark.parametrize("topology", [H100_NODE, FOUR_L40, TWO_NODES, LAPTOP])
def test_a_topology_survives_being_gathered(topology: Topology) -> None:
    documents = [place.as_dict() for place in topology.ranks]
    assert Topology.gathered(documents) == topology
    described = topology.as_dict()
    assert described["num_hosts"] == len(topology.hosts)
    assert {place["host"] for place in described["places"]} == set(range(len(topology.hosts)))


def test_relations_between_ranks() -> None:
    assert H100_NODE.symbol(0, 7) == "NV18"
    assert H100_NODE.symbol(3, 3) == "X"
    assert FOUR_L40.symbol(0, 1) == "PIX"
    assert FOUR_L40.symbol(0, 2) == "SYS"
    assert TWO_NODES.symbol(0, 8) == "NET"
    assert TWO_NODES.symbol(8, 9) == "NV18"
    assert LAPTOP.symbol(0, 1) == "MEM"


def test_an_unknown_path_is_not_taken_for_another() -> None:
    places = h100_places()
    bare = RankHardware(8, "a", "cuda", "NVIDIA H100 80GB HBM3", "GPU-new")
    assert Topology((*places, bare)).relation(8, 0) == "unknown"


@pytest.mark.parametrize("ranks", [[], [1], [0, 2], [1, 0]])
def test_missing_ranks_are_refused(ranks: list[int]) -> None:
    places = h100_places()
    with pytest.raises(ValueError, match="give one for each"):
        Topology(tuple(places[rank] for rank in ranks))
