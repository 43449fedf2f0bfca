"""From times of ranks to a latency, and how rounds are interleaved."""

from __future__ import annotations

import pytest

from flashhead_dist.bench.timing import RankTimes, summarise, time_interleaved


def test_latency_is_the_slowest_rank_of_each_iteration() -> None:
    """Each rank is fast on average; every iteration waits for the other one."""
    ranks = [
        RankTimes((100.0, 900.0, 100.0), (0.0, 0.0, 0.0)),
        RankTimes((900.0, 100.0, 800.0), (0.0, 0.0, 0.0)),
    ]
    latency = summarise(ranks)
    assert latency.median_us == 900.0
    assert latency.num_iterations == 3
    assert latency.compute_us_by_rank == (100.0, 800.0)


def test_waiting_for_a_slower_rank_is_no_communication() -> None:
    """Rank 0 computes 10 us and waits 90 in the collective for rank 1, whose wire time is 5 us."""
    latency = summarise([RankTimes((105.0,), (95.0,)), RankTimes((105.0,), (5.0,))])
    assert latency.compute_us == 100.0
    assert latency.communication_us == 5.0


def test_percentiles_are_over_iterations() -> None:
    wall = tuple(float(value) for value in range(101))
    latency = summarise([RankTimes(wall, (0.0,) * 101)])
    assert (latency.p10_us, latency.median_us, latency.p90_us) == (10.0, 50.0, 90.0)


@pytest.mark.parametrize(
    "ranks",
    [
        [],
        [RankTimes((), ())],
        [RankTimes((1.0,), (0.0,)), RankTimes((1.0, 2.0), (0.0, 0.0))],
    ],
)
def test_ranks_without_the_same_iterations_are_refused(ranks: list[RankTimes]) -> None:
    with pytest.raises(ValueError, match="same number of iterations"):
        summarise(ranks)


def test_rank_times_survive_the_wire() -> None:
    times = RankTimes((1.25, 2.5), (0.5, 0.75))
    assert RankTimes.from_json(times.as_json()) == times


def test_every_head_takes_one_step_a_round_in_rotating_order() -> None:
    log: list[str] = []

    def step(name: str) -> object:
        def run(iteration: int) -> tuple[float, float]:
            log.append(f"{name}{iteration}")
            return float(iteration), 0.0

        return run

    times = time_interleaved(
        {name: step(name) for name in "abc"},  # type: ignore[misc]
        3,
    )
    assert log == [
        *("a0", "b0", "c0"),
        *("b1", "c1", "a1"),
        *("c2", "a2", "b2"),
    ]
    assert times["b"].wall_us == (0.0, 1.0, 2.0)
