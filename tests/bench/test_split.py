"""A step taken apart: parts add up, waiting is for the slowest rank, and that rank is named."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest

from flashhead_dist.bench.split import (
    PARTS,
    Quantiles,
    RankParts,
    SlowRank,
    StepSplit,
    find_slow_rank,
    parts_of_steps,
    split_isolated,
    split_together,
)
from flashhead_profiles.ranges import Span


def rank(compute_us: float, exchanges_us: tuple[float, ...], num_iterations: int = 5) -> RankParts:
    """Iterations all alike: 60 % centroids, 30 % candidates, 10 % other."""
    times = num_iterations
    return RankParts(
        (compute_us + sum(exchanges_us),) * times,
        (0.6 * compute_us,) * times,
        (0.3 * compute_us,) * times,
        (exchanges_us,) * times,
    )


def median(split: StepSplit, part: str, of_rank: int | None = None) -> float:
    found = split.step_us[part]
    if of_rank is not None:
        by_rank = split.by_rank_us[part]
        found = None if by_rank is None else by_rank[of_rank]
    assert found is not None
    return found.median


def test_waiting_is_what_an_exchange_takes_beyond_the_shortest() -> None:
    """Rank 1 computes 300 us longer, so ranks 0 and 2 wait as long for it, apart from the wire."""
    split = split_together([rank(100, (350,)), rank(400, (50,)), rank(110, (340,))], "how")
    assert [median(split, "exchange", r) for r in range(3)] == [50, 50, 50]
    assert [median(split, "waiting", r) for r in range(3)] == [300, 0, 290]
    assert [median(split, "step", r) for r in range(3)] == [450, 450, 450]
    assert median(split, "centroids", 1) == 240
    assert split.slow_rank is not None
    assert split.slow_rank.rank == 1
    assert split.slow_rank.excess_us == pytest.approx(295)


def test_the_step_is_the_path_of_the_rank_that_computes_longest() -> None:
    split = split_together([rank(100, (350,)), rank(400, (50,)), rank(110, (340,))], "how")
    parts = [median(split, part) for part in ("centroids", "candidates", "other", "exchange")]
    assert parts == pytest.approx([240, 120, 40, 50])
    assert median(split, "step") == pytest.approx(sum(parts))
    assert median(split, "waiting") == 300


def test_every_exchange_of_a_step_has_a_slowest_rank_of_its_own() -> None:
    """Sums of two exchanges would say that nobody waited: each rank is last once."""
    split = split_together([rank(100, (90, 10)), rank(100, (10, 90))], "how")
    assert median(split, "exchange") == 20
    assert [median(split, "waiting", r) for r in range(2)] == [80, 80]


def test_iterations_may_differ_in_their_exchanges() -> None:
    """A head that looks twice at some rows exchanges twice in some steps."""
    once, twice = ((50.0,),) * 3, ((50.0, 30.0),) * 2
    late = ((90.0,),) * 3, ((90.0, 30.0),) * 2
    ranks = [
        RankParts((200.0,) * 5, (60.0,) * 5, (20.0,) * 5, exchanges)
        for exchanges in (once + twice, late[0] + late[1])
    ]
    split = split_together(ranks, "how")
    assert [median(split, "waiting", r) for r in range(2)] == [0, 40]
    exchange = split.step_us["exchange"]
    assert exchange is not None
    assert (exchange.median, exchange.p90) == (50, 80)


def test_a_rank_alone_waits_as_long_as_the_slowest_computes_longer() -> None:
    split = split_isolated([rank(100, ()), rank(400, ()), rank(110, ())], "how")
    assert [median(split, "waiting", r) for r in range(3)] == pytest.approx([300, 0, 290])
    assert split.step_us["exchange"] is split.by_rank_us["exchange"] is None
    # Without the exchange no step is known, only compute.
    assert split.step_us["step"] is split.by_rank_us["step"] is None
    assert split.slow_rank == SlowRank(1, pytest.approx(295))


def test_one_rank_alone_has_no_exchange_and_nobody_to_wait_for() -> None:
    split = split_together([rank(100, ())], "how")
    assert median(split, "exchange") == median(split, "waiting") == 0
    assert median(split, "step") == pytest.approx(100)
    assert split.slow_rank is None


def test_a_rank_is_slow_only_beyond_the_scatter_of_all_others() -> None:
    steady = np.full((3, 20), 100.0)
    slow = steady.copy()
    slow[2] = 150
    assert find_slow_rank(slow) == SlowRank(2, 50.0)
    slightly = steady.copy()
    slightly[2] = 105
    assert find_slow_rank(slightly) is None
    # Another rank takes as long in more than a tenth of its steps: which one is slow is chance.
    scattered = slow.copy()
    scattered[0, :4] = 200
    assert find_slow_rank(scattered) is None
    # Nor is a rank slow that something else took the core from in half of its steps.
    robbed = steady.copy()
    robbed[2, ::2] = 900
    assert find_slow_rank(robbed) is None
    assert find_slow_rank(steady[:1]) is None


def test_json_gives_the_same_split() -> None:
    for split in (
        split_together([rank(100, (350,)), rank(400, (50,))], "how"),
        split_isolated([rank(100, ()), rank(400, ())], "how"),
    ):
        again = StepSplit.from_json(json.loads(json.dumps(asdict(split))))
        assert again == split
        assert set(again.step_us) == set(again.by_rank_us) == {"step", *PARTS}
        assert isinstance(again.step_us["waiting"], Quantiles)


def test_ranks_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="iterations"):
        split_together([rank(1, ()), rank(1, (), 3)], "how")
    with pytest.raises(ValueError, match="exchanges"):
        split_together([rank(1, (1,)), rank(1, (1, 1))], "how")
    with pytest.raises(ValueError, match="iterations"):
        split_together([], "how")


def test_parts_are_sums_over_a_step_and_what_is_inside_other_ranges_counts_once() -> None:
    def span(name: str, us: float, depth: int = 1) -> Span:
        return Span(name, None, None, 0.0, us, depth)

    spans = [
        span("step", 100, 0), span("head", 95), span("head/centroids", 30, 2),
        span("head/exchange", 5, 2), span("head/candidates", 20, 2),
        span("head/candidates", 10, 2), span("head/exchange", 7, 2), span("head/result", 3, 2),
    ]  # fmt: skip
    parts = parts_of_steps([spans, spans])
    assert parts == RankParts((100.0,) * 2, (30.0,) * 2, (30.0,) * 2, ((5.0, 7.0),) * 2)
