"""gloo's ring followed message by message, against what its protocol says by hand."""

from __future__ import annotations

import pytest

from flashhead_topology.gloo_ring import (
    NOTICE_BYTES,
    Hop,
    all_gather_phases,
    all_reduce_phases,
    ring_s,
)


def uniform(ranks: int, alpha_s: float = 1.0, beta_s_per_byte: float = 0.0) -> list[Hop]:
    return [Hop(alpha_s, beta_s_per_byte, rank) for rank in range(ranks)]


@pytest.mark.parametrize("ranks", [2, 3, 4, 5, 8])
def test_a_step_costs_a_notice_and_a_message(ranks: int) -> None:
    """Every rank posts its receive when its sender posts the send: each step is two delays."""
    full = 8 * 4 * ranks
    assert ring_s(all_reduce_phases(full, ranks), uniform(ranks)) == 4 * (ranks - 1)
    assert ring_s(all_gather_phases(full, ranks), uniform(ranks)) == 2 * (ranks - 1)


@pytest.mark.parametrize("ranks", [2, 3, 4, 5, 8])
def test_one_key_finds_the_notices_waiting(ranks: int) -> None:
    """One element travels the ring twice; only its first hop waits for a notice.

    A model of `2 (P - 1)` double steps says 4 (P - 1).
    """
    assert ring_s(all_reduce_phases(8, ranks), uniform(ranks)) == 2 * ranks - 1


@pytest.mark.parametrize("ranks", [2, 3, 4, 7])
@pytest.mark.parametrize("num_bytes", [8, 40, 1000, 1 << 20, 5 << 20])
def test_every_rank_sends_what_a_ring_sends(ranks: int, num_bytes: int) -> None:
    reduced = all_reduce_phases(num_bytes, ranks, element_bytes=8)
    sent = [sum(sizes[rank] for phase in reduced for sizes in phase) for rank in range(ranks)]
    assert sum(sent) == 2 * (ranks - 1) * num_bytes
    part = num_bytes // ranks
    for phase in all_gather_phases(part * ranks, ranks):
        assert [sum(column) for column in zip(*phase, strict=True)] == [(ranks - 1) * part] * ranks


def test_no_segment_exceeds_gloos_limit_or_cuts_an_element() -> None:
    for phase in all_reduce_phases(64 << 20, 2, element_bytes=8):
        assert max(size for sizes in phase for size in sizes) == 1 << 20
    for phase in all_reduce_phases(8 * 13, 4, element_bytes=8):
        assert all(size % 8 == 0 for sizes in phase for size in sizes)


def test_bandwidth_counts_once_where_delay_hides_behind_it() -> None:
    """2 ranks gather 2 MB: 1 MB leaves each at 8 ns a byte, in two halves, after one notice."""
    alpha_s, beta = 1e-4, 8e-9
    took_s = ring_s(all_gather_phases(2_000_000, 2), uniform(2, alpha_s, beta))
    # The second half's notice leaves while the first one travels.
    assert took_s == pytest.approx(2 * alpha_s + (NOTICE_BYTES + 1_000_000) * beta)
    # 4 ranks gather 4 MB: three times as much leaves, and delays hide behind it in part only.
    took_s = ring_s(all_gather_phases(4_000_000, 4), uniform(4, alpha_s, beta))
    assert 3_000_000 * beta + 2 * alpha_s < took_s < 3_000_000 * beta + 6 * alpha_s


def test_one_rank_for_all_is_the_ring_of_all() -> None:
    """The short cut for equal hops: hops that differ by nothing that counts are followed singly."""
    ranks, phases = 6, all_reduce_phases(6 * 12 * 1000, 6)
    nearly = [Hop(1e-4 * (1 + 1e-9 * rank), 8e-9, rank) for rank in range(ranks)]
    followed = ring_s(phases, nearly)
    assert ring_s(phases, uniform(ranks, 1e-4, 8e-9)) == pytest.approx(followed, rel=1e-6)


def test_a_slow_link_holds_up_the_whole_ring() -> None:
    hops = uniform(4)
    hops[2] = Hop(11.0, 0.0, 2)
    full = 8 * 16
    slow_s = ring_s(all_gather_phases(full, 4), hops)
    # Its own step's notice and message are slow each time; the others' steps overlap with it.
    assert slow_s == pytest.approx(3 * 22)
    assert ring_s(all_reduce_phases(full, 4), hops) == pytest.approx(6 * 22)
