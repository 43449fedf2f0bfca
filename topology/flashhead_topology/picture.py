"""A topology as a picture: hosts, NUMA nodes, devices, and the links between them.

Each kind of host is drawn once. Devices stand in their NUMA node above its cores; NVLink is drawn
above the devices, PCIe below, and ways out of the host at its foot.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flashhead_topology.drawing import alike_hosts, gbit_per_s
from flashhead_topology.machine import counted
from flashhead_topology.place import Host, Place, Topology

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_DRAWN = 16
"""Ranks of a host, and kinds of hosts, that are drawn; the rest is counted."""
_WIDTH, _GAP = 1.0, 0.3
_DEVICE_Y, _DEVICE_HEIGHT = 2.2, 0.9
_SWITCH_Y, _CORES_Y, _OUT_Y = 1.75, 0.95, -0.35
_NVLINK_Y = 3.65
_TOP, _FOOT = 4.5, -0.75
_NVLINK, _PCIE, _HOST = "#2E7D32", "#6B7280", "#9CA3AF"
_DEVICE, _CPU, _OUT = "#DBEAFE", "#F3F4F6", "#FEF3C7"
_SMALL, _NORMAL = 7.5, 9


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
    widths = [_host_width(hosts[0]) for hosts in drawn]
    figure = NewFigure(
        figsize=(max(widths) * 1.05 + 0.6, 3.7 * len(drawn) + 0.2), layout="constrained"
    )
    for number, hosts in enumerate(drawn, start=1):
        axes = figure.add_subplot(len(drawn), 1, number)
        axes.set_xlim(-0.1, max(widths) + 0.3)
        axes.set_ylim(-1.4, _TOP + 0.55)
        axes.set_axis_off()
        _draw_host(axes, hosts, topology)
    left_out = len(kinds) - len(drawn)
    if left_out:
        figure.supxlabel(f"{counted(left_out, 'further kind')} of hosts left out", fontsize=_SMALL)
    return figure


def _host_width(host: Host) -> float:
    nodes = _by_node(host)
    return sum(_node_width(places) for _, places in nodes) + _GAP * (len(nodes) + 1)


def _node_width(places: Sequence[Place]) -> float:
    return max(1.7, len(places) * (_WIDTH + 0.12) + 0.2)


def _by_node(host: Host) -> list[tuple[str, list[Place]]]:
    """The places that are drawn, by NUMA node; those of several nodes or none stand apart."""
    nodes: dict[str, list[Place]] = {}
    for place in host.places[:_MOST_DRAWN]:
        name = "NUMA nodes " if len(place.numa_nodes) > 1 else "NUMA node "
        name += ", ".join(map(str, place.numa_nodes)) or "not known"
        nodes.setdefault(name, []).append(place)
    return sorted(nodes.items())


def _draw_host(axes: Axes, hosts: Sequence[Host], topology: Topology) -> None:
    host = hosts[0]
    width = _host_width(host)
    several = len(hosts) > 1
    for shift in (0.14, 0.07) if several else ():
        _box(axes, shift, _FOOT + shift, width, _TOP - _FOOT, "white", _HOST)
    _box(axes, 0.0, _FOOT, width, _TOP - _FOOT, "white", _HOST)
    title = f"{counted(len(hosts), 'host')} of {counted(len(host.places), 'rank')}"
    if several:
        title += f" (ranks {host.ranks[0]} to {hosts[-1].ranks[-1]}), drawn once"
    left_out = len(host.places) - _MOST_DRAWN
    if left_out > 0:
        title += f"; the first {_MOST_DRAWN} ranks"
    cores = {len(place.cores) for place in host.places}
    if len(cores) == 1:
        title += f"; {counted(cores.pop(), 'core')} for each process"
    axes.text(0.0, _TOP + 0.35, title, fontsize=_NORMAL, fontweight="bold", va="center")
    centres: dict[int, float] = {}
    left = _GAP
    middles: list[float] = []
    for name, places in _by_node(host):
        node_width = _node_width(places)
        _draw_node(axes, name, places, left, node_width, centres)
        middles.append(left + node_width / 2)
        left += node_width + _GAP
    _draw_nvlink(axes, centres, topology)
    _draw_pcie(axes, centres, topology)
    if len(middles) > 1:
        axes.plot(middles, [_CORES_Y + 0.1] * len(middles), color=_PCIE, linewidth=2.5, zorder=1)
    _draw_ways_out(axes, hosts, width, topology)


def _draw_node(
    axes: Axes,
    name: str,
    places: Sequence[Place],
    left: float,
    width: float,
    centres: dict[int, float],
) -> None:
    """A NUMA node's devices and cores; notes where the middle of each rank's device is."""
    _box(axes, left, 0.55, width, 2.75, "none", _HOST, dashed=True)
    for position, place in enumerate(places):
        x = left + 0.16 + position * (_WIDTH + 0.12)
        centres[place.rank] = x + _WIDTH / 2
        _box(axes, x, _DEVICE_Y, _WIDTH, _DEVICE_HEIGHT, _DEVICE, "#1D4ED8")
        device = _device_lines(place.device_name) if place.device_type == "cuda" else "CPU"
        label = f"rank {place.rank}\n{device}"
        axes.text(
            x + _WIDTH / 2,
            _DEVICE_Y + _DEVICE_HEIGHT / 2,
            label,
            fontsize=_SMALL,
            ha="center",
            va="center",
        )
    _box(axes, left + 0.12, _CORES_Y - 0.22, width - 0.24, 0.5, _CPU, _PCIE)
    axes.text(left + width / 2, _CORES_Y + 0.03, name, fontsize=_SMALL, ha="center", va="center")


def _device_lines(name: str) -> str:
    """A GPU's name in lines that fit its box, without the maker's name."""
    words = name.removeprefix("NVIDIA ").split()
    return "\n".join(" ".join(words[i : i + 2]) for i in range(0, min(len(words), 4), 2))


def _draw_nvlink(axes: Axes, centres: dict[int, float], topology: Topology) -> None:
    """A bar where all are joined alike, else a bow for each pair that is."""
    ranks = list(centres)
    pairs = [(a, b) for a in ranks for b in ranks if a < b and topology.relation(a, b) == "nvlink"]
    if not pairs:
        return
    top = _DEVICE_Y + _DEVICE_HEIGHT
    symbols = {topology.symbol(a, b) for a, b in pairs}
    if len(pairs) == len(ranks) * (len(ranks) - 1) // 2 and len(symbols) == 1 and len(ranks) > 2:
        first, last = min(centres.values()), max(centres.values())
        _box(axes, first - 0.3, _NVLINK_Y + 0.25, last - first + 0.6, 0.3, "#E8F5E9", _NVLINK)
        text = f"NVLink: {symbols.pop()} between all"
        axes.text(
            (first + last) / 2, _NVLINK_Y + 0.4, text, fontsize=_SMALL, ha="center", va="center"
        )
        for x in centres.values():
            axes.plot([x, x], [top, _NVLINK_Y + 0.25], color=_NVLINK, linewidth=2, zorder=1)
        return
    for first_rank, second_rank in pairs:
        a, b = sorted((centres[first_rank], centres[second_rank]))
        height = _NVLINK_Y + 0.12 * (b - a)
        axes.plot([a, a, b, b], [top, height, height, top], color=_NVLINK, linewidth=2, zorder=3)
        symbol = topology.symbol(first_rank, second_rank)
        axes.text((a + b) / 2, height + 0.05, symbol, fontsize=_SMALL, ha="center", color=_NVLINK)


def _draw_pcie(axes: Axes, centres: dict[int, float], topology: Topology) -> None:
    """Devices under one switch share a bar; every device or bar has a line to its cores."""
    left = [rank for rank in centres if topology.places[rank].device_type == "cuda"]
    while left:
        near = {"switch", "switches"}
        island = [left[0], *(r for r in left[1:] if topology.relation(left[0], r) in near)]
        left = [rank for rank in left if rank not in island]
        xs = [centres[rank] for rank in island]
        for x in xs:
            axes.plot([x, x], [_SWITCH_Y, _DEVICE_Y], color=_PCIE, linewidth=1.2, zorder=1)
        middle = sum(xs) / len(xs)
        axes.plot([middle] * 2, [_CORES_Y + 0.28, _SWITCH_Y], color=_PCIE, linewidth=1.2, zorder=1)
        if len(island) > 1:
            _box(axes, xs[0] - 0.3, _SWITCH_Y - 0.12, xs[-1] - xs[0] + 0.6, 0.26, "white", _PCIE)
            symbol = topology.symbol(island[0], island[1])
            text = f"PCIe switch ({symbol})"
            axes.text(middle, _SWITCH_Y, text, fontsize=_SMALL, ha="center", va="center")


def _draw_ways_out(axes: Axes, hosts: Sequence[Host], width: float, topology: Topology) -> None:
    """One box for adapters that are alike, and the network where there are other hosts."""
    kinds: dict[tuple[str, str], int] = {}
    for item in hosts[0].interfaces:
        key = (gbit_per_s(item), item.link_layer)
        kinds[key] = kinds.get(key, 0) + 1
    if not kinds:
        text = "no way out of the host is known"
        axes.text(_GAP, _OUT_Y + 0.05, text, fontsize=_SMALL, va="center")
    room = (width - 2 * _GAP) / max(1, len(kinds))
    joined = len(topology.hosts) > 1
    for position, ((speed, layer), count) in enumerate(kinds.items()):
        x = _GAP + position * room
        _box(axes, x + 0.05, _OUT_Y - 0.2, room - 0.1, 0.5, _OUT, "#B45309")
        rate = "speed not known" if speed == "?" else f"{speed} Gbit/s"
        several = f"{count} x " if count > 1 else ""
        text = f"{several}{rate}\n{layer}" if room < 2.6 else f"{several}{rate} {layer}"
        axes.text(x + room / 2, _OUT_Y + 0.05, text, fontsize=_SMALL, ha="center", va="center")
        if joined:
            axes.plot([x + room / 2] * 2, [-1.05, _OUT_Y - 0.2], color="#B45309", linewidth=1.2)
    if joined:
        axes.plot([0.1, width - 0.1], [-1.05, -1.05], color="#B45309", linewidth=3)
        text = f"network of {counted(len(topology.hosts), 'host')}"
        axes.text(width / 2, -1.15, text, fontsize=_SMALL, ha="center", va="top")


def _box(
    axes: Axes,
    x: float,
    y: float,
    width: float,
    height: float,
    face: str,
    edge: str,
    *,
    dashed: bool = False,
) -> None:
    from matplotlib.patches import FancyBboxPatch

    axes.add_patch(
        FancyBboxPatch(
            (x, y),
            width,
            height,
            boxstyle="round,pad=0,rounding_size=0.06",
            facecolor=face,
            edgecolor=edge,
            linewidth=1.1,
            linestyle="--" if dashed else "-",
            zorder=0.5 if edge == _HOST else 2,
        )
    )
