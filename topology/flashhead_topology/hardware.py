"""The hardware of each rank of a run, gathered into one frozen description.

Made by `probe` on a real machine, by hand in tests. An unknown fact is None or omitted, and
`missing` says why.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from flashhead_topology.machine import DeviceType

PathKind = Literal["nvlink", "switch", "switches", "host_bridge", "node", "system"]
"""The nearest that two GPUs have in common, as NVML reports it: NVLink, one PCIe switch, several, a
host bridge (a CPU's root port), a NUMA node, or only the link between NUMA nodes."""

Relation = Literal["self", "memory", "network", "unknown"] | PathKind
"""Between two ranks: `memory` for two CPU ranks of one host, `network` between hosts."""

SYMBOLS: Mapping[str, str] = {
    "self": "X",
    "nvlink": "NV",
    "switch": "PIX",
    "switches": "PXB",
    "host_bridge": "PHB",
    "node": "NODE",
    "system": "SYS",
    "memory": "MEM",
    "network": "NET",
    "unknown": "?",
}
"""As `nvidia-smi topo -m` writes them; MEM, NET and ? are ours."""


@dataclass(frozen=True)
class Interface:
    """A network interface or adapter.

    kind: `ethernet`, or `infiniband` for an adapter that InfiniBand's drivers own (Ethernet with
        RDMA too; `link_layer` tells them apart).
    bits_per_s: None where the driver does not say, or makes it up as that of a virtual one does.
    network_names: what sockets know it by; an adapter may have none.
    """

    name: str
    kind: Literal["ethernet", "infiniband"]
    bits_per_s: float | None
    link_layer: str = "Ethernet"
    numa_node: int | None = None
    network_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class PeerPath:
    """From this rank's GPU to another of its host. `peer`: the other's uuid.

    num_links: NVLinks, 0 for any other kind. atomics: whether the two have native atomics on each
    other's memory; None where the driver does not say.
    """

    peer: str
    kind: PathKind
    num_links: int = 0
    atomics: bool | None = None


@dataclass(frozen=True)
class RankHardware:
    """The hardware of one rank.

    host: a name that ranks share exactly if they share a kernel and a network namespace.
    uuid: of the GPU; empty on a CPU. numa_nodes: of the GPU, or of the cores on a CPU.
    cores: logical CPUs that the process may use, by number. pcie: generation and lanes in use.
    missing: reasons by the name of the unknown fact.
    """

    rank: int
    host: str
    device_type: DeviceType
    device_name: str
    uuid: str = ""
    numa_nodes: tuple[int, ...] = ()
    cores: tuple[int, ...] = ()
    paths: tuple[PeerPath, ...] = ()
    interfaces: tuple[Interface, ...] = ()
    pcie: tuple[int, int] | None = None
    missing: Mapping[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> RankHardware:
        """The hardware of a JSON form."""
        given = dict(document)
        given["paths"] = tuple(PeerPath(**item) for item in given["paths"])
        given["interfaces"] = tuple(
            Interface(**item | {"network_names": tuple(item["network_names"])})
            for item in given["interfaces"]
        )
        for name in ("numa_nodes", "cores"):
            given[name] = tuple(given[name])
        given["pcie"] = tuple(given["pcie"]) if given["pcie"] else None
        return cls(**given)


@dataclass(frozen=True)
class Host:
    """The ranks of one host, in rank order. `number` counts hosts in the order of their ranks."""

    number: int
    ranks: tuple[RankHardware, ...]

    @property
    def rank_numbers(self) -> tuple[int, ...]:
        """Global ranks."""
        return tuple(rank.rank for rank in self.ranks)

    @property
    def interfaces(self) -> tuple[Interface, ...]:
        """Network interfaces, as its first rank sees them."""
        return self.ranks[0].interfaces


@dataclass(frozen=True)
class Topology:
    """The hardware of all ranks, in rank order."""

    ranks: tuple[RankHardware, ...]

    def __post_init__(self) -> None:
        ranks = [rank.rank for rank in self.ranks]
        if ranks != list(range(len(ranks))) or not ranks:
            raise ValueError(f"ranks are {ranks}: give one for each of 0, 1, ...")

    @classmethod
    def gathered(cls, documents: Sequence[Mapping[str, Any]]) -> Topology:
        """The topology of every rank's `RankHardware.as_dict()`, in rank order."""
        return cls(tuple(RankHardware.from_dict(document) for document in documents))

    @property
    def hosts(self) -> tuple[Host, ...]:
        """Hosts in the order of their first ranks."""
        by_name: dict[str, list[RankHardware]] = {}
        for rank in self.ranks:
            by_name.setdefault(rank.host, []).append(rank)
        return tuple(Host(n, tuple(ranks)) for n, ranks in enumerate(by_name.values()))

    @property
    def device_type(self) -> DeviceType:
        """`cuda` where every rank has a GPU."""
        on_gpus = all(rank.device_type == "cuda" for rank in self.ranks)
        return "cuda" if on_gpus else "cpu"

    def relation(self, first: int, second: int) -> Relation:
        """What lies between two ranks."""
        path = self.path(first, second)
        if path is not None:
            return path.kind
        here, there = self.ranks[first], self.ranks[second]
        if here.host != there.host:
            return "network"
        if first == second or (here.uuid and here.uuid == there.uuid):
            return "self"
        on_cpu = here.device_type == there.device_type == "cpu"
        return "memory" if on_cpu else "unknown"

    def path(self, first: int, second: int) -> PeerPath | None:
        """The path between the GPUs of two ranks of a host; None where there is none known."""
        here, there = self.ranks[first], self.ranks[second]
        if here.host != there.host or not there.uuid:
            return None
        return next((path for path in here.paths if path.peer == there.uuid), None)

    def symbol(self, first: int, second: int) -> str:
        """What lies between two ranks as `nvidia-smi topo -m` would write it: `NV18`, `PHB`."""
        path = self.path(first, second)
        links = str(path.num_links) if path is not None and path.num_links else ""
        return SYMBOLS[self.relation(first, second)] + links

    def as_dict(self) -> dict[str, Any]:
        """JSON form, hosts by number in place of their names."""
        numbers = {host.ranks[0].host: host.number for host in self.hosts}
        return {
            "num_hosts": len(self.hosts),
            "places": [rank.as_dict() | {"host": numbers[rank.host]} for rank in self.ranks],
        }
