"""The host behind long round trips is told from those that only talk to it."""

from __future__ import annotations

from itertools import combinations

import pytest

from flashhead_topology.slow_links import slow_links


def trips(num_hosts: int, slow: set[int], factor: float = 10.0) -> dict[tuple[int, int], float]:
    return {
        pair: 1e-3 * (factor if slow & set(pair) else 1.0)
        for pair in combinations(range(num_hosts), 2)
    }


@pytest.mark.parametrize("num_hosts", [3, 4, 8])
@pytest.mark.parametrize("slow", [0, 2])
def test_the_host_with_the_slow_link_is_found(num_hosts: int, slow: int) -> None:
    """A rule by a host's longest trip would blame all of four hosts for one."""
    (found,) = slow_links(trips(num_hosts, {slow}))
    assert found.host == slow
    assert found.factor == pytest.approx(10)


def test_two_slow_links_among_many_are_both_found() -> None:
    assert [link.host for link in slow_links(trips(6, {1, 4}))] == [1, 4]


def test_equal_links_and_noise_are_not_slow() -> None:
    assert slow_links(trips(4, set())) == []
    assert slow_links(trips(4, {2}, factor=1.9)) == []


def test_two_hosts_cannot_be_told_apart() -> None:
    assert slow_links(trips(2, {1})) == []
    assert slow_links({}) == []
