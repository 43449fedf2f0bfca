"""Drawings of machines that do not exist, in text and as pictures.

Mutated to see each fail: hosts that differ drawn once, a bar of NVLink drawn for pairs, missing
facts left out, a PCIe switch left out.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from flashhead_topology.drawing import alike_hosts, missing_facts, short_drawing, text_drawing
from flashhead_topology.hardware import Topology
from tests.topology.invented import (
    FOUR_L40,
    H100_NODE,
    LAPTOP,
    TWO_NODES,
    h100_places,
    l40_places,
    laptop_places,
)

MACHINES = [H100_NODE, FOUR_L40, TWO_NODES, LAPTOP]
CLUSTER = Topology(tuple(place for h in range(128) for place in h100_places(f"h{h}", 8 * h)))
UNLIKE = Topology(
    (*h100_places("a"), *(replace(place, rank=8 + place.rank) for place in laptop_places()))
)
BRIDGED = Topology(
    tuple(
        replace(
            place,
            paths=tuple(
                replace(path, kind="nvlink", num_links=4) if path.kind == "switch" else path
                for path in place.paths
            ),
        )
        for place in l40_places()
    )
)


@pytest.mark.parametrize(
    ("topology", "line"),
    [
        (
            H100_NODE,
            "1 host of 8 ranks: 8 x NVIDIA H100 80GB HBM3, NV18 between all; 2 NUMA nodes; "
            "8 x 400 Gbit/s InfiniBand, 10 Gbit/s Ethernet",
        ),
        (
            FOUR_L40,
            "1 host of 4 ranks: 4 x NVIDIA L40, PIX between 2 pairs and SYS between 4 pairs; "
            "2 NUMA nodes; 100 Gbit/s Ethernet",
        ),
        (
            LAPTOP,
            "1 host of 2 ranks: AMD Ryzen 7 PRO 7840U, 8 cores; 1 NUMA node; "
            "Ethernet of unknown speed",
        ),
    ],
)
def test_short_drawing(topology: Topology, line: str) -> None:
    assert short_drawing(topology) == line


def test_short_drawing_of_hosts() -> None:
    assert short_drawing(TWO_NODES).startswith("2 hosts of 8 ranks: 8 x NVIDIA H100")
    assert short_drawing(CLUSTER).replace("128 hosts", "2 hosts") == short_drawing(TWO_NODES)
    assert short_drawing(UNLIKE).count("1 host of") == 2


def test_ranks_and_paths_are_tables() -> None:
    lines = text_drawing(FOUR_L40).splitlines()
    assert "   2  NVIDIA L40     1   0-63  4 x16" in lines
    assert "2  SYS  SYS    X  PIX" in lines
    assert "ens1f0        100  Ethernet     0" in lines


@pytest.mark.parametrize("topology", [*MACHINES, UNLIKE, BRIDGED])
def test_the_legend_explains_exactly_what_is_used(topology: Topology) -> None:
    text = text_drawing(topology)
    meanings = {"NVLink, with": "NV", "one PCIe switch": "PIX", "memory of one": "MEM"}
    for meaning, symbol in meanings.items():
        used = any(
            topology.symbol(a.rank, b.rank).startswith(symbol)
            for a in topology.ranks
            for b in topology.ranks
        )
        assert (meaning in text) == used


def test_alike_hosts_are_drawn_once() -> None:
    assert [len(hosts) for hosts in alike_hosts(CLUSTER)] == [128]
    assert [len(hosts) for hosts in alike_hosts(UNLIKE)] == [1, 1]
    assert len(text_drawing(CLUSTER).splitlines()) == len(text_drawing(TWO_NODES).splitlines())
    assert "hosts 0 to 127, ranks 0 to 1023; drawn once" in text_drawing(CLUSTER)
    slower = [replace(place, pcie=(4, 16)) for place in h100_places("b", 8)]
    assert len(alike_hosts(Topology((*h100_places(), *slower)))) == 2


def test_many_ranks_of_a_host_are_counted() -> None:
    crowd = Topology(tuple(laptop_places(20)))
    text = text_drawing(crowd)
    assert "paths: 190 pairs MEM" in text
    assert "19  AMD Ryzen" in text


def test_what_is_missing_is_said_once_for_all_ranks() -> None:
    (line,) = missing_facts(LAPTOP)
    assert line == "speed of ranks 0-1: " + LAPTOP.ranks[0].missing["speed"]
    assert line in text_drawing(LAPTOP)
    assert missing_facts(H100_NODE) == []
    assert "missing:" not in text_drawing(H100_NODE)


def test_no_line_is_wider_than_a_page() -> None:
    for topology in (*MACHINES, CLUSTER):
        assert max(map(len, text_drawing(topology).splitlines())) <= 100


@pytest.mark.parametrize("topology", [*MACHINES, UNLIKE, BRIDGED, CLUSTER])
def test_the_picture_has_every_rank_and_nothing_cut_off(topology: Topology) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from flashhead_topology.drawing import topology_figure

    figure = topology_figure(topology)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    width, height = canvas.get_width_height()
    texts = [text for axes in figure.axes for text in axes.texts]
    for text in texts:
        box = text.get_window_extent(canvas.get_renderer())
        assert min(box.x0, box.y0) >= 0, text.get_text()
        assert (box.x1 <= width, box.y1 <= height) == (True, True), text.get_text()
    words = "\n".join(text.get_text() for text in texts)
    for hosts in alike_hosts(topology):
        for place in hosts[0].ranks:
            assert f"rank {place.rank}\n" in words
    assert ("network of" in words) == (len(topology.hosts) > 1)
    assert ("NV18 between all" in words) == (topology in (H100_NODE, TWO_NODES, UNLIKE, CLUSTER))
    assert words.count("PCIe switch") == (2 if topology is FOUR_L40 else 0)
    assert words.count("NV4") == (2 if topology is BRIDGED else 0)


def test_the_picture_is_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from flashhead_topology.drawing import write_picture

    write_picture(LAPTOP, tmp_path / "topology.png")
    assert (tmp_path / "topology.png").read_bytes().startswith(b"\x89PNG")
