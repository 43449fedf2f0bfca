"""A topology in text: one line for a log, or ranks, paths and ways out as tables.

Hosts that are alike are drawn once, so that 128 nodes take no more room than one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import groupby

from flashhead_topology.machine import counted
from flashhead_topology.place import SYMBOLS, Host, Interface, Place, Topology

_MEANINGS = {
    "X": "itself",
    "NV": "NVLink, with the number of links",
    "PIX": "one PCIe switch",
    "PXB": "several PCIe switches",
    "PHB": "a PCIe host bridge",
    "NODE": "within a NUMA node",
    "SYS": "between NUMA nodes",
    "MEM": "memory of one host",
    "NET": "network",
    "?": "not known",
}
_MOST_IN_MATRIX = 16
"""Ranks of a host up to which every path is written; above, the paths are counted."""


def short_drawing(topology: Topology) -> str:
    """One line: `2 hosts of 8 ranks: 8 x NVIDIA H100 80GB HBM3, NV18 between all; 2 NUMA nodes;
    8 x 400 Gbit/s InfiniBand`.
    """
    return "; ".join(
        f"{_title(hosts)}: {_devices(hosts[0])}{_joined(hosts[0], topology)}; "
        f"{_nodes(hosts[0])}; {_ways_out(hosts[0].interfaces)}"
        for hosts in alike_hosts(topology)
    )


def text_drawing(topology: Topology) -> str:
    """Tables of ranks, of paths between them and of ways out, with a legend and what is missing."""
    blocks = [block for hosts in alike_hosts(topology) for block in _host_blocks(hosts, topology)]
    if len(topology.hosts) > 1:
        blocks.append(f"{SYMBOLS['network']} between all ranks of different hosts")
    used = _symbols(topology)
    blocks.append(
        "\n".join(f"{name:>4}  {meaning}" for name, meaning in _MEANINGS.items() if name in used)
    )
    missing = missing_facts(topology)
    if missing:
        blocks.append("\n".join(["missing:", *(f"  {line}" for line in missing)]))
    return "\n\n".join(blocks) + "\n"


def alike_hosts(topology: Topology) -> list[list[Host]]:
    """Neighbouring hosts that differ in nothing but names and numbers, together."""
    return [list(hosts) for _, hosts in groupby(topology.hosts, lambda h: _likeness(h, topology))]


def missing_facts(topology: Topology) -> list[str]:
    """What is not known, once for each reason, with the ranks that it holds for."""
    ranks: dict[tuple[str, str], list[int]] = {}
    for place in topology.places:
        for name, reason in place.missing.items():
            ranks.setdefault((name, reason), []).append(place.rank)
    return [f"{name} of {_ranks(held)}: {reason}" for (name, reason), held in ranks.items()]


def _likeness(host: Host, topology: Topology) -> tuple[object, ...]:
    symbols = tuple(topology.symbol(a, b) for a in host.ranks for b in host.ranks)
    places = tuple((p.device_name, p.numa_nodes, p.cores, p.pcie) for p in host.places)
    return (symbols, places, host.interfaces)


def _host_blocks(hosts: Sequence[Host], topology: Topology) -> list[str]:
    host = hosts[0]
    blocks = [f"{_title(hosts)} ({_numbers(hosts)})\n{_rank_table(host)}"]
    if len(host.places) > 1:
        matrix = len(host.places) <= _MOST_IN_MATRIX
        blocks.append(_matrix(host, topology) if matrix else _path_counts(host, topology))
    blocks.append(_interface_table(host.interfaces))
    return blocks


def _rank_table(host: Host) -> str:
    rows = [("rank", "device", "NUMA", "cores", "PCIe")]
    for place in host.places:
        pcie = f"{place.pcie[0]} x{place.pcie[1]}" if place.pcie else "-"
        rows.append(
            (str(place.rank), place.device_name, _node_list(place), _cores(place.cores), pcie)
        )
    return _columns(rows, left=(1,))


def _matrix(host: Host, topology: Topology) -> str:
    rows = [("", *(str(rank) for rank in host.ranks))]
    for first in host.ranks:
        rows.append((str(first), *(topology.symbol(first, second) for second in host.ranks)))
    return _columns(rows)


def _path_counts(host: Host, topology: Topology) -> str:
    counts = Counter(topology.symbol(a, b) for a in host.ranks for b in host.ranks if a < b)
    pairs = [f"{counted(number, 'pair')} {symbol}" for symbol, number in sorted(counts.items())]
    return f"paths: {', '.join(pairs)}"


def _interface_table(interfaces: Sequence[Interface]) -> str:
    if not interfaces:
        return "no way out of the host is known"
    rows = [("interface", "Gbit/s", "link", "NUMA")]
    for item in interfaces:
        node = "-" if item.numa_node is None else str(item.numa_node)
        rows.append((item.name, gbit_per_s(item), item.link_layer, node))
    return _columns(rows, left=(0, 2))


def _columns(rows: Sequence[Sequence[str]], left: Sequence[int] = ()) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _title(hosts: Sequence[Host]) -> str:
    ranks = counted(len(hosts[0].places), "rank")
    return f"{counted(len(hosts), 'host')} of {ranks}"


def _numbers(hosts: Sequence[Host]) -> str:
    first, last = hosts[0], hosts[-1]
    if first is last:
        return f"host {first.number}"
    alike = f"hosts {first.number} to {last.number}, ranks {first.ranks[0]} to {last.ranks[-1]}"
    return f"{alike}; drawn once"


def _devices(host: Host) -> str:
    names = Counter(place.device_name for place in host.places)
    if host.places[0].device_type == "cpu":
        return f"{host.places[0].device_name}, {counted(len(host.places[0].cores), 'core')}"
    return " + ".join(f"{count} x {name}" for name, count in names.items())


def _joined(host: Host, topology: Topology) -> str:
    if len(host.places) < 2 or host.places[0].device_type == "cpu":
        return ""
    symbols = Counter(topology.symbol(a, b) for a in host.ranks for b in host.ranks if a < b)
    if len(symbols) == 1:
        return f", {next(iter(symbols))} between all"
    pairs = [f"{symbol} between {counted(n, 'pair')}" for symbol, n in symbols.items()]
    return f", {' and '.join(pairs)}"


def _nodes(host: Host) -> str:
    nodes = {node for place in host.places for node in place.numa_nodes}
    return counted(len(nodes), "NUMA node") if nodes else "NUMA nodes not known"


def _ways_out(interfaces: Sequence[Interface]) -> str:
    if not interfaces:
        return "ways out not known"
    kinds = Counter((gbit_per_s(item), item.link_layer) for item in interfaces)
    return ", ".join(
        f"{f'{count} x ' if count > 1 else ''}"
        + (f"{layer} of unknown speed" if speed == "?" else f"{speed} Gbit/s {layer}")
        for (speed, layer), count in kinds.items()
    )


def gbit_per_s(item: Interface) -> str:
    """The speed of an interface, or `?`."""
    return f"{item.bits_per_s / 1e9:g}" if item.bits_per_s else "?"


def _node_list(place: Place) -> str:
    return ",".join(map(str, place.numa_nodes)) or "-"


def _cores(cores: Sequence[int]) -> str:
    """`0-3,8` as the kernel writes CPUs."""
    if not cores:
        return "-"
    runs: list[list[int]] = []
    for core in sorted(cores):
        if runs and core == runs[-1][1] + 1:
            runs[-1][1] = core
        else:
            runs.append([core, core])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {_cores(ranks)}"


def _symbols(topology: Topology) -> set[str]:
    """Symbols in use, without the number of links. All hosts of a group are like its first."""
    used = {
        SYMBOLS[topology.relation(a, b)]
        for hosts in alike_hosts(topology)
        for a in hosts[0].ranks
        for b in hosts[0].ranks
    }
    return used | ({SYMBOLS["network"]} if len(topology.hosts) > 1 else set())
