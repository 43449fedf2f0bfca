"""A topology as text (one line, or tables of ranks, paths and interfaces) and as a picture.

Hosts that are alike are drawn once. In the picture devices are in their NUMA node above its cores,
NVLink above the devices, PCIe below, and interfaces at the foot of the host.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import combinations, groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashhead_topology.hardware import SYMBOLS, Host, Interface, RankHardware, Topology
from flashhead_topology.machine import counted

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
    "?": "unknown",
}
_MOST_DRAWN = 16
"""Ranks of a host, and kinds of hosts, that are drawn; the rest is counted."""


def short_drawing(topology: Topology) -> str:
    """One line: `2 hosts of 8 ranks: 8 x NVIDIA H100 80GB HBM3, NV18 between all; 2 NUMA nodes;
    8 x 400 Gbit/s InfiniBand`.
    """
    return "; ".join(
        f"{_title(hosts)}: {_devices(hosts[0])}{_joined(hosts[0], topology)}; "
        f"{_nodes(hosts[0])}; {_interfaces(hosts[0].interfaces)}"
        for hosts in alike_hosts(topology)
    )


def text_drawing(topology: Topology) -> str:
    """Tables of ranks, paths and interfaces, with a legend and what is missing."""
    blocks: list[str] = []
    used = {SYMBOLS["network"]} if len(topology.hosts) > 1 else set()
    for hosts in alike_hosts(topology):
        host = hosts[0]
        used |= {
            SYMBOLS[topology.relation(a, b)] for a in host.rank_numbers for b in host.rank_numbers
        }
        blocks.append(f"{_title(hosts)} ({_numbers(hosts)})\n{_rank_table(host)}")
        if len(host.ranks) > 1:
            blocks.append(_paths(host, topology))
        blocks.append(_interface_table(host.interfaces))
    if len(topology.hosts) > 1:
        blocks.append(f"{SYMBOLS['network']} between all ranks of different hosts")
    blocks.append(
        "\n".join(f"{name:>4}  {text}" for name, text in _MEANINGS.items() if name in used)
    )
    if missing := missing_facts(topology):
        blocks.append("\n".join(["missing:", *(f"  {line}" for line in missing)]))
    return "\n\n".join(blocks) + "\n"


def alike_hosts(topology: Topology) -> list[list[Host]]:
    """Neighbouring hosts that differ in nothing but names and numbers, together."""

    def likeness(host: Host) -> tuple[object, ...]:
        numbers = host.rank_numbers
        symbols = tuple(topology.symbol(a, b) for a in numbers for b in numbers)
        ranks = tuple((r.device_name, r.numa_nodes, r.cores, r.pcie) for r in host.ranks)
        return (symbols, ranks, host.interfaces)

    return [list(hosts) for _, hosts in groupby(topology.hosts, likeness)]


def missing_facts(topology: Topology) -> list[str]:
    """What is unknown, once for each reason, with the ranks that it holds for."""
    ranks: dict[tuple[str, str], list[int]] = {}
    for rank in topology.ranks:
        for name, reason in rank.missing.items():
            ranks.setdefault((name, reason), []).append(rank.rank)
    return [
        f"{name} of {'rank' if len(held) == 1 else 'ranks'} {_ranges(held)}: {reason}"
        for (name, reason), held in ranks.items()
    ]


def _pairs(host: Host, topology: Topology) -> Counter[str]:
    """Pairs of the host's ranks by the symbol of the path between them."""
    return Counter(topology.symbol(a, b) for a, b in combinations(host.rank_numbers, 2))


def _rank_table(host: Host) -> str:
    rows = [("rank", "device", "NUMA", "cores", "PCIe")]
    for rank in host.ranks:
        pcie = f"{rank.pcie[0]} x{rank.pcie[1]}" if rank.pcie else "-"
        nodes = ",".join(map(str, rank.numa_nodes)) or "-"
        rows.append((str(rank.rank), rank.device_name, nodes, _ranges(rank.cores), pcie))
    return _columns(rows, left=(1,))


def _paths(host: Host, topology: Topology) -> str:
    if len(host.ranks) > _MOST_DRAWN:
        counts = sorted(_pairs(host, topology).items())
        return "paths: " + ", ".join(f"{counted(n, 'pair')} {symbol}" for symbol, n in counts)
    numbers = host.rank_numbers
    rows = [("", *map(str, numbers))]
    rows += [(str(a), *(topology.symbol(a, b) for b in numbers)) for a in numbers]
    return _columns(rows)


def _interface_table(interfaces: Sequence[Interface]) -> str:
    if not interfaces:
        return "no interface is known"
    rows = [("interface", "Gbit/s", "link", "NUMA")]
    for item in interfaces:
        node = "-" if item.numa_node is None else str(item.numa_node)
        rows.append((item.name, _gbit_per_s(item), item.link_layer, node))
    return _columns(rows, left=(0, 2))


def _columns(rows: Sequence[Sequence[str]], left: Sequence[int] = ()) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _title(hosts: Sequence[Host]) -> str:
    return f"{counted(len(hosts), 'host')} of {counted(len(hosts[0].ranks), 'rank')}"


def _numbers(hosts: Sequence[Host]) -> str:
    first, last = hosts[0], hosts[-1]
    if first is last:
        return f"host {first.number}"
    ranks = f"ranks {first.rank_numbers[0]} to {last.rank_numbers[-1]}"
    return f"hosts {first.number} to {last.number}, {ranks}; drawn once"


def _devices(host: Host) -> str:
    if host.ranks[0].device_type == "cpu":
        return f"{host.ranks[0].device_name}, {counted(len(host.ranks[0].cores), 'core')}"
    names = Counter(rank.device_name for rank in host.ranks)
    return " + ".join(f"{count} x {name}" for name, count in names.items())


def _joined(host: Host, topology: Topology) -> str:
    if len(host.ranks) < 2 or host.ranks[0].device_type == "cpu":
        return ""
    symbols = _pairs(host, topology)
    if len(symbols) == 1:
        return f", {next(iter(symbols))} between all"
    pairs = [f"{symbol} between {counted(n, 'pair')}" for symbol, n in symbols.items()]
    return f", {' and '.join(pairs)}"


def _nodes(host: Host) -> str:
    nodes = {node for rank in host.ranks for node in rank.numa_nodes}
    return counted(len(nodes), "NUMA node") if nodes else "NUMA nodes unknown"


def _interfaces(interfaces: Sequence[Interface], separator: str = " ") -> str:
    """`8 x 400 Gbit/s InfiniBand, Ethernet of unknown speed`."""
    kinds = Counter((_gbit_per_s(item), item.link_layer) for item in interfaces)
    return (
        ", ".join(
            f"{f'{count} x ' if count > 1 else ''}"
            + (f"{layer} of unknown speed" if speed == "?" else f"{speed} Gbit/s{separator}{layer}")
            for (speed, layer), count in kinds.items()
        )
        or "interfaces unknown"
    )


def _gbit_per_s(item: Interface) -> str:
    return f"{item.bits_per_s / 1e9:g}" if item.bits_per_s else "?"


def _ranges(numbers: Sequence[int]) -> str:
    """`0-3,8` as the kernel writes CPUs; `-` for none."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs) or "-"


_WIDTH, _STEP, _GAP = 1.0, 1.12, 0.3
_DEVICE_Y, _DEVICE_TOP, _SWITCH_Y, _CORES_Y = 2.2, 3.1, 1.75, 0.95
_TOP, _FOOT, _INTERFACE_Y, _NETWORK_Y = 4.5, -0.75, -0.3, -1.05
_NVLINK, _PCIE, _HOST, _NETWORK = "#2E7D32", "#6B7280", "#9CA3AF", "#B45309"


def write_picture(topology: Topology, path: Path) -> None:
    """Draw into a PNG (or what the path's suffix says).

    Raises:
        ImportError: matplotlib is missing.
        OSError: the file cannot be written.
    """
    topology_figure(topology).savefig(path, dpi=150)


def topology_figure(topology: Topology) -> Figure:
    """The picture as a matplotlib figure.

    Raises:
        ImportError: matplotlib is missing.
    """
    from matplotlib.figure import Figure as NewFigure

    kinds = alike_hosts(topology)
    drawn = kinds[:_MOST_DRAWN]
    width = max(_host_width(hosts[0]) for hosts in drawn)
    figure = NewFigure(figsize=(width * 1.05 + 0.6, 3.7 * len(drawn) + 0.2), layout="constrained")
    for number, hosts in enumerate(drawn, start=1):
        axes = figure.add_subplot(len(drawn), 1, number)
        axes.set_xlim(-0.1, width + 0.3)
        axes.set_ylim(-1.4, _TOP + 0.55)
        axes.set_axis_off()
        _draw_host(axes, hosts, topology)
    if len(kinds) > len(drawn):
        figure.supxlabel(f"{len(kinds) - len(drawn)} further kinds of hosts", fontsize=7.5)
    return figure


def _by_node(host: Host) -> list[tuple[str, list[RankHardware]]]:
    """The ranks that are drawn, by NUMA node."""
    nodes: dict[str, list[RankHardware]] = {}
    for rank in host.ranks[:_MOST_DRAWN]:
        name = "NUMA nodes " if len(rank.numa_nodes) > 1 else "NUMA node "
        nodes.setdefault(name + (", ".join(map(str, rank.numa_nodes)) or "unknown"), []).append(
            rank
        )
    return sorted(nodes.items())


def _node_width(num_ranks: int) -> float:
    return max(1.7, num_ranks * _STEP + 0.2)


def _host_width(host: Host) -> float:
    return _GAP + sum(_node_width(len(ranks)) + _GAP for _, ranks in _by_node(host))


def _draw_host(axes: Axes, hosts: Sequence[Host], topology: Topology) -> None:
    host, width = hosts[0], _host_width(hosts[0])
    for shift in (0.14, 0.07, 0.0) if len(hosts) > 1 else (0.0,):
        _box(
            axes, (shift, _FOOT + shift, width, _TOP - _FOOT), face="white", edge=_HOST, zorder=0.5
        )
    title = _title(hosts)
    if len(hosts) > 1:
        title += f" (ranks {host.rank_numbers[0]} to {hosts[-1].rank_numbers[-1]}), drawn once"
    if len(host.ranks) > _MOST_DRAWN:
        title += f"; the first {_MOST_DRAWN} ranks"
    cores = {len(rank.cores) for rank in host.ranks}
    if len(cores) == 1:
        title += f"; {counted(cores.pop(), 'core')} for each process"
    axes.text(0.0, _TOP + 0.35, title, fontsize=9, fontweight="bold", va="center")
    centres: dict[int, float] = {}
    middles: list[float] = []
    left = _GAP
    for name, ranks in _by_node(host):
        node_width = _node_width(len(ranks))
        _box(axes, (left, 0.55, node_width, 2.75), edge=_HOST, linestyle="--", zorder=0.5)
        for position, rank in enumerate(ranks):
            x = left + 0.16 + position * _STEP
            centres[rank.rank] = x + _WIDTH / 2
            words = rank.device_name.removeprefix("NVIDIA ").split()[:4]
            device = [" ".join(words[:2]), " ".join(words[2:])]
            lines = device if rank.device_type == "cuda" else ["CPU"]
            text = "\n".join([f"rank {rank.rank}", *filter(None, lines)])
            box = (x, _DEVICE_Y, _WIDTH, _DEVICE_TOP - _DEVICE_Y)
            _box(axes, box, text, face="#DBEAFE", edge="#1D4ED8")
        _box(axes, (left + 0.12, _CORES_Y - 0.22, node_width - 0.24, 0.5), name, face="#F3F4F6")
        middles.append(left + node_width / 2)
        left += node_width + _GAP
    if len(middles) > 1:
        axes.plot(middles, [_CORES_Y + 0.1] * len(middles), color=_PCIE, linewidth=2.5, zorder=1)
    _draw_nvlink(axes, centres, topology)
    _draw_pcie(axes, centres, topology)
    box = (_GAP, _INTERFACE_Y - 0.25, width - 2 * _GAP, 0.55)
    text = _interfaces(host.interfaces).replace(", ", "\n" if width < 5 else ", ")
    _box(axes, box, text, face="#FEF3C7", edge=_NETWORK)
    if len(topology.hosts) > 1:
        line = {"color": _NETWORK, "linewidth": 2.5}
        axes.plot([width / 2] * 2, [_NETWORK_Y, _INTERFACE_Y - 0.25], **line)  # type: ignore[arg-type]
        axes.plot([0.1, width - 0.1], [_NETWORK_Y] * 2, **line)  # type: ignore[arg-type]
        text = f"network of {counted(len(topology.hosts), 'host')}"
        axes.text(width / 2, _NETWORK_Y - 0.1, text, fontsize=7.5, ha="center", va="top")


def _draw_nvlink(axes: Axes, centres: dict[int, float], topology: Topology) -> None:
    """A bar where all are joined alike, else a bow for each pair that is."""
    every = list(combinations(centres, 2))
    pairs = [(a, b) for a, b in every if topology.relation(a, b) == "nvlink"]
    symbols = {topology.symbol(a, b) for a, b in pairs}
    line = {"color": _NVLINK, "linewidth": 2, "zorder": 1}
    if len(pairs) == len(every) and len(symbols) == 1 and len(centres) > 2:
        first, last = min(centres.values()), max(centres.values())
        box = (first - 0.3, 3.9, last - first + 0.6, 0.3)
        _box(axes, box, f"NVLink: {symbols.pop()} between all", face="#E8F5E9", edge=_NVLINK)
        for x in centres.values():
            axes.plot([x, x], [_DEVICE_TOP, 3.9], **line)  # type: ignore[arg-type]
        return
    for one, other in pairs:
        a, b = sorted((centres[one], centres[other]))
        y = 3.65 + 0.12 * (b - a)
        axes.plot([a, a, b, b], [_DEVICE_TOP, y, y, _DEVICE_TOP], **line)  # type: ignore[arg-type]
        label = topology.symbol(one, other)
        axes.text((a + b) / 2, y + 0.05, label, fontsize=7.5, ha="center", color=_NVLINK)


def _draw_pcie(axes: Axes, centres: dict[int, float], topology: Topology) -> None:
    """Devices under one switch share a bar; every device or bar has a line to its cores."""
    left = [rank for rank in centres if topology.ranks[rank].device_type == "cuda"]
    line = {"color": _PCIE, "linewidth": 1.2, "zorder": 1}
    while left:
        switched = ("switch", "switches")
        island = [r for r in left if r == left[0] or topology.relation(left[0], r) in switched]
        left = [rank for rank in left if rank not in island]
        xs = [centres[rank] for rank in island]
        middle = sum(xs) / len(xs)
        for x in xs:
            axes.plot([x, x], [_SWITCH_Y, _DEVICE_Y], **line)  # type: ignore[arg-type]
        axes.plot([middle] * 2, [_CORES_Y + 0.28, _SWITCH_Y], **line)  # type: ignore[arg-type]
        if len(island) > 1:
            text = f"PCIe switch ({topology.symbol(island[0], island[1])})"
            box = (xs[0] - 0.3, _SWITCH_Y - 0.12, xs[-1] - xs[0] + 0.6, 0.26)
            _box(axes, box, text, face="white")


def _box(
    axes: Axes,
    box: tuple[float, float, float, float],
    text: str = "",
    *,
    face: str = "none",
    edge: str = _PCIE,
    **style: Any,
) -> None:
    """A rounded box at (x, y, width, height) with `text` in its middle."""
    from matplotlib.patches import FancyBboxPatch

    x, y, width, height = box
    style = {"linewidth": 1.1, "zorder": 2} | style
    rounded = "round,pad=0,rounding_size=0.06"
    axes.add_patch(
        FancyBboxPatch(
            (x, y), width, height, boxstyle=rounded, facecolor=face, edgecolor=edge, **style
        )
    )
    middle = (x + width / 2, y + height / 2)
    axes.text(*middle, text, fontsize=7.5, ha="center", va="center", zorder=3)
