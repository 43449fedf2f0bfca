"""The time of a collective against figures worked out by hand.

Units are chosen so that the hand can: a delay of 1 s, a byte of 1 ms.
"""

from __future__ import annotations

import pytest

from flashhead_topology.links import ALGORITHMS, OPERATIONS, collective_time_s
from flashhead_topology.systems import Level

ALPHA, BETA = 1.0, 1e-3
FLAT = [Level("network", 1024, ALPHA, BETA)]
NODES = [Level("node", 4, 0.1, 1e-4), Level("network", 64, 10.0, 1e-2, base_s=5.0)]


@pytest.mark.parametrize(
    ("operation", "algorithm", "tp_size", "expected_s"),
    [
        # 7 hops of 8 ranks; every rank sends 7/8 of 4,000 bytes, twice where it also reduces.
        ("all_gather", "ring", 8, 7 + 3.5),
        ("all_reduce", "ring", 8, 2 * (7 + 3.5)),
        ("all_reduce", "ring", 2, 2 * (1 + 2)),
        # A chain of 8 up and down again; the buffer leaves each rank twice.
        ("all_reduce", "tree", 8, 2 * (7 + 4)),
        ("send_recv", None, 8, 1 + 4),
        ("send_recv", "gloo_ring", 2, 1 + 4),
    ],
)
def test_flat_collectives(
    operation: str, algorithm: str | None, tp_size: int, expected_s: float
) -> None:
    took_s = collective_time_s(operation, 4000, tp_size=tp_size, levels=FLAT, algorithm=algorithm)
    assert took_s == pytest.approx(expected_s)


def test_a_ring_crosses_each_level_as_often_as_its_ranks_say() -> None:
    """A model with the slowest alpha for every hop, or without base_s, fails here."""
    # 16 ranks in 4 nodes: 12 hops within a node, 4 between; one of the quick ones is spared.
    delay_s = 11 * 0.1 + 4 * 10.0
    sent_s = 15 / 16 * 1600 * 1e-2
    took_s = collective_time_s("all_gather", 1600, tp_size=16, levels=NODES, algorithm="ring")
    assert took_s == pytest.approx(5 + delay_s + sent_s)


def test_ranks_of_one_node_never_see_the_network() -> None:
    took_s = collective_time_s("all_gather", 400, tp_size=4, levels=NODES, algorithm="ring")
    assert took_s == pytest.approx(3 * 0.1 + 300 * 1e-4)
    with pytest.raises(ValueError, match=r"tp_size 65 .* 64 ranks"):
        collective_time_s("all_gather", 400, tp_size=65, levels=NODES)


def test_a_tree_is_a_chain_within_a_node_and_halves_the_nodes() -> None:
    took_s = collective_time_s("all_reduce", 100, tp_size=16, levels=NODES, algorithm="tree")
    assert took_s == pytest.approx(5 + 2 * (3 * 0.1 + 2 * 10.0 + 100 * 1e-2))


def test_the_quicker_of_ring_and_tree_is_taken() -> None:
    """16 nodes: a tree has fewer delays, a ring moves half the bytes."""
    for num_bytes, quicker in ((8, "tree"), (1 << 22, "ring")):
        times_s = {
            name: collective_time_s(
                "all_reduce", num_bytes, tp_size=64, levels=NODES, algorithm=name
            )
            for name in ("ring", "tree", None)
        }
        assert times_s[None] == min(times_s.values()) == times_s[quicker]
        assert times_s["ring"] != times_s["tree"]


def test_one_shot_waits_once_and_sends_to_every_peer() -> None:
    levels = [Level("node", 8, 9.0, BETA, base_s=99.0, one_shot_alpha_s=2.0)]
    took_s = collective_time_s("one_shot", 1000, tp_size=8, levels=levels)
    assert took_s == pytest.approx(2 + 7)
    with pytest.raises(ValueError, match=r"level network .* cannot write"):
        collective_time_s("one_shot", 8, tp_size=2, levels=FLAT)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("algorithm", [None, *ALGORITHMS])
def test_nothing_sent_takes_no_time(operation: str, algorithm: str | None) -> None:
    if (operation, algorithm) == ("all_gather", "tree"):
        return
    options = {"levels": NODES, "algorithm": algorithm}
    assert collective_time_s(operation, 0, tp_size=8, **options) == 0
    assert collective_time_s(operation, 800, tp_size=1, **options) == 0
    assert collective_time_s(operation, 800, tp_size=1, levels=[]) == 0


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"operation": "all_to_all"}, "operation 'all_to_all' is none of all_reduce"),
        ({"algorithm": "star"}, "algorithm 'star' is none of ring, tree"),
        ({"operation": "all_gather", "algorithm": "tree"}, "a tree gathers nothing"),
        ({"payload_bytes": -8}, "payload_bytes is -8"),
        ({"payload_bytes": float("nan")}, "payload_bytes is nan"),
        ({"tp_size": 0}, "tp_size 0 does not lie between 1 and the 1024 ranks"),
        ({"levels": []}, "tp_size 2 does not lie between 1 and the 1 ranks"),
    ],
)
def test_what_cannot_be_is_refused(changed: dict[str, object], sentence: str) -> None:
    given = {"operation": "all_reduce", "payload_bytes": 8, "tp_size": 2, "levels": FLAT} | changed
    with pytest.raises(ValueError, match=sentence):
        collective_time_s(given.pop("operation"), given.pop("payload_bytes"), **given)


def test_more_ranks_or_bytes_never_take_less() -> None:
    for operation in ("all_reduce", "all_gather"):
        for algorithm in (None, "ring", "gloo_ring"):
            by_size = [
                collective_time_s(
                    operation, 1 << 16, tp_size=size, levels=NODES, algorithm=algorithm
                )
                for size in (2, 3, 4, 5, 8, 16, 64)
            ]
            assert by_size == sorted(by_size), (operation, algorithm)
            by_bytes = [
                collective_time_s(operation, size, tp_size=8, levels=NODES, algorithm=algorithm)
                for size in (64, 4096, 1 << 16, 1 << 22)
            ]
            assert by_bytes == sorted(by_bytes), (operation, algorithm)
