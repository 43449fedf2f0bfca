"""What Linux says of NUMA nodes and network interfaces, read from files under a given root.

The root is `/sys` on a real machine and a folder of files in tests.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from flashhead_topology.place import Interface

SYS = Path("/sys")
_ETHERNET, _INFINIBAND = "1", "32"
"""ARPHRD_ETHER and ARPHRD_INFINIBAND of linux/if_arp.h."""
_UP = ("up", "unknown")
"""An interface whose driver does not report its state says `unknown` while it works."""


def parse_cpu_list(text: str) -> tuple[int, ...]:
    """CPUs of a list as the kernel writes it: `0-3,8` is 0, 1, 2, 3, 8; empty text is none.

    Raises:
        ValueError: the text is no such list.
    """
    cpus: list[int] = []
    for piece in filter(None, text.strip().split(",")):
        first, dash, last = piece.partition("-")
        cpus.extend(range(int(first), int(last if dash else first) + 1))
    return tuple(cpus)


def numa_nodes_of(cores: Iterable[int], root: Path = SYS) -> tuple[int, ...]:
    """NUMA nodes that hold any of `cores`, ascending; none where the kernel knows no nodes."""
    wanted = set(cores)
    nodes = []
    for folder in sorted((root / "devices/system/node").glob("node[0-9]*")):
        if wanted & set(parse_cpu_list(_read(folder / "cpulist") or "")):
            nodes.append(int(folder.name.removeprefix("node")))
    return tuple(sorted(nodes))


def numa_node_of_pci(bus_id: str, root: Path = SYS) -> int | None:
    """NUMA node of the PCI device at `0000:1b:00.0` (NVML's longer domain too), where it has one.

    A machine with one node, and most virtual ones, say -1: None here.
    """
    domain, _, rest = bus_id.lower().partition(":")
    return _node(root / "bus/pci/devices" / f"{domain[-4:]}:{rest}" / "numa_node")


def read_interfaces(root: Path = SYS) -> tuple[Interface, ...]:
    """Adapters that are up, fastest first; loopback, tunnels, bridges and their ports left out.

    An Ethernet or IPoIB interface of an adapter that is listed by InfiniBand's drivers is left out
    too: the adapter stands for it.
    """
    adapters, theirs = _infiniband(root)
    found = list(adapters)
    for folder in sorted((root / "class/net").glob("*")):
        if folder.name in theirs or _read(folder / "type") not in (_ETHERNET, _INFINIBAND):
            continue
        if (folder / "bridge").exists() or (folder / "master").exists():
            continue
        if _read(folder / "operstate") not in _UP:
            continue
        found.append(
            Interface(
                folder.name,
                "ethernet",
                _speed(folder),
                numa_node=_node(folder / "device/numa_node"),
                network_names=(folder.name,),
            )
        )
    return tuple(sorted(found, key=lambda item: (-(item.bits_per_s or 0.0), item.name)))


def _infiniband(root: Path) -> tuple[list[Interface], set[str]]:
    """Active ports of InfiniBand adapters, and the network interfaces that belong to them."""
    adapters: list[Interface] = []
    theirs: set[str] = set()
    for folder in sorted((root / "class/infiniband").glob("*")):
        for port in sorted((folder / "ports").glob("[0-9]*")):
            if "ACTIVE" not in (_read(port / "state") or ""):
                continue
            rate = re.match(r"([\d.]+) Gb/sec", _read(port / "rate") or "")
            names = tuple(sorted(path.name for path in (folder / "device/net").glob("*")))
            theirs.update(names)
            adapters.append(
                Interface(
                    folder.name,
                    "infiniband",
                    float(rate[1]) * 1e9 if rate else None,
                    _read(port / "link_layer") or "InfiniBand",
                    _node(folder / "device/numa_node"),
                    names,
                )
            )
    return adapters, theirs


def _speed(folder: Path) -> float | None:
    """Bits a second of a network interface, where a device is behind it, or behind its parts.

    Without one the driver makes it up: a veth says 10 Gbit/s whatever carries it.
    """
    parts = re.search(r"^DEVTYPE=(bond|vlan)$", _read(folder / "uevent") or "", re.MULTILINE)
    if not (folder / "device").exists() and not parts:
        return None
    megabits = _number(_read(folder / "speed"))
    return None if megabits is None or megabits <= 0 else megabits * 1e6


def _node(path: Path) -> int | None:
    node = _number(_read(path))
    return None if node is None or node < 0 else node


def _number(text: str | None) -> int | None:
    try:
        return None if text is None else int(text)
    except ValueError:
        return None


def _read(path: Path) -> str | None:
    """The file's text without blanks around it; None where it cannot be read.

    The speed of an interface that is down is there and refuses to be read.
    """
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return None
