"""Machines that do not exist: as descriptions, and as an NVML that would describe them."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from flashhead_topology.hardware import Interface, PathKind, PeerPath, RankHardware, Topology

NDR = tuple(
    Interface(f"mlx5_{n}", "infiniband", 400e9, "InfiniBand", n // 4, (f"ib{n}",)) for n in range(8)
)
MANAGEMENT = Interface("eno1", "ethernet", 10e9, numa_node=0, network_names=("eno1",))


def h100_places(host: str = "a", first_rank: int = 0, num_ranks: int = 8) -> list[RankHardware]:
    """A node of 8 H100 on NVLink through switches, 2 NUMA nodes of 56 cores, 8 NDR adapters."""
    uuids = [f"GPU-{host}-{n}" for n in range(8)]
    return [
        RankHardware(
            rank=first_rank + n,
            host=host,
            device_type="cuda",
            device_name="NVIDIA H100 80GB HBM3",
            uuid=uuids[n],
            numa_nodes=(n // 4,),
            cores=tuple(range(112)),
            paths=tuple(PeerPath(u, "nvlink", 18, True) for u in uuids if u != uuids[n]),
            interfaces=(*NDR, MANAGEMENT),
            pcie=(5, 16),
        )
        for n in range(num_ranks)
    ]


def l40_places(num_ranks: int = 4) -> list[RankHardware]:
    """Four L40 on PCIe: two under each CPU, each pair under one switch; 100 Gbit/s Ethernet."""
    uuids = [f"GPU-l40-{n}" for n in range(4)]

    def kind(first: int, second: int) -> PathKind:
        return "switch" if first // 2 == second // 2 else "system"

    return [
        RankHardware(
            rank=n,
            host="l40",
            device_type="cuda",
            device_name="NVIDIA L40",
            uuid=uuids[n],
            numa_nodes=(n // 2,),
            cores=tuple(range(64)),
            paths=tuple(PeerPath(uuids[m], kind(n, m), 0, False) for m in range(4) if m != n),
            interfaces=(Interface("ens1f0", "ethernet", 100e9, "Ethernet", 0, ("ens1f0",)),),
            pcie=(4, 16),
        )
        for n in range(num_ranks)
    ]


def laptop_places(num_ranks: int = 2) -> list[RankHardware]:
    """A laptop: no CUDA GPU, 8 logical CPUs in one NUMA node, wireless with no stated speed."""
    return [
        RankHardware(
            rank=n,
            host="laptop",
            device_type="cpu",
            device_name="AMD Ryzen 7 PRO 7840U",
            numa_nodes=(0,),
            cores=tuple(range(8)),
            interfaces=(Interface("wlp1s0", "ethernet", None, network_names=("wlp1s0",)),),
            missing={"speed": "no network interface tells its speed, as virtual ones do not"},
        )
        for n in range(num_ranks)
    ]


H100_NODE = Topology(tuple(h100_places()))
FOUR_L40 = Topology(tuple(l40_places()))
TWO_NODES = Topology((*h100_places("a"), *h100_places("b", 8)))
LAPTOP = Topology(tuple(laptop_places()))


class NvmlError(Exception):
    """Stands for `pynvml.NVMLError`."""


@dataclass
class FakeNvml:
    """The part of `pynvml` that is asked, over invented GPUs.

    ancestors: by pair of numbers, lower first; nvlinks: links between the pair, through a switch
    where `switched`. refuses: names of functions that raise.
    """

    num_gpus: int
    ancestors: dict[tuple[int, int], int] = field(default_factory=dict)
    nvlinks: int = 0
    switched: bool = True
    refuses: tuple[str, ...] = ()
    open: int = 0

    NVMLError = NvmlError
    NVML_P2P_CAPS_INDEX_NVLINK = 2
    NVML_P2P_CAPS_INDEX_ATOMICS = 3
    NVML_P2P_STATUS_OK = 0
    NVML_NVLINK_MAX_LINKS = 36
    NVML_NVLINK_DEVICE_TYPE_SWITCH = 2

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("nvml") and name in object.__getattribute__(self, "refuses"):
            raise_ = NvmlError(f"{name} is not supported")

            def refuse(*_: object) -> None:
                raise raise_

            return refuse
        return object.__getattribute__(self, name)

    def nvmlInit(self) -> None:  # noqa: N802
        self.open += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return self.num_gpus

    def nvmlDeviceGetHandleByIndex(self, number: int) -> int:  # noqa: N802
        return number

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:  # noqa: N802
        numbers = [n for n in range(self.num_gpus) if self.nvmlDeviceGetUUID(n) == uuid]
        if not numbers:
            raise NvmlError("Not Found")
        return numbers[0]

    def nvmlDeviceGetUUID(self, handle: int) -> str:  # noqa: N802
        return f"GPU-{handle}"

    def nvmlDeviceGetPciInfo(self, handle: int) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(busId=f"00000000:{handle + 0x1B:02X}:00.0")

    def nvmlDeviceGetTopologyCommonAncestor(self, first: int, second: int) -> int:  # noqa: N802
        return self.ancestors[min(first, second), max(first, second)]

    def nvmlDeviceGetP2PStatus(self, first: int, second: int, capability: int) -> int:  # noqa: N802
        return 0 if self.nvlinks else 5

    def nvmlDeviceGetNvLinkState(self, handle: int, link: int) -> int:  # noqa: N802
        if link >= 18:
            raise NvmlError("Invalid Argument")
        return int(link < self.nvlinks)

    def nvmlDeviceGetNvLinkRemotePciInfo(self, handle: int, link: int) -> SimpleNamespace:  # noqa: N802
        if self.switched:
            return SimpleNamespace(busId="00000000:C0:00.0")
        others = [n for n in range(self.num_gpus) if n != handle]
        return self.nvmlDeviceGetPciInfo(others[link % len(others)])

    def nvmlDeviceGetNvLinkRemoteDeviceType(self, handle: int, link: int) -> int:  # noqa: N802
        return 2 if self.switched else 0

    def nvmlDeviceGetCurrPcieLinkGeneration(self, handle: int) -> int:  # noqa: N802
        return 5

    def nvmlDeviceGetCurrPcieLinkWidth(self, handle: int) -> int:  # noqa: N802
        return 16
