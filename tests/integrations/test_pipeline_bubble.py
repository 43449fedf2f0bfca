"""The idle time of a pipeline: formulas against a replay of the schedule, slot by slot."""

from __future__ import annotations

import pytest

from flashhead_dist.integrations.pipeline_bubble import (
    StageTimes,
    continuous_bubble,
    flushed_bubble,
    ideal_bubble,
    measured_bubble,
    replay,
)

SHAPES = [(2, 1, 1), (2, 1, 9), (2, 2, 9), (2, 5, 4), (4, 1, 3), (4, 3, 7), (4, 4, 7), (4, 9, 2)]


def rounds(num_micro_batches: int, num_steps: int) -> list[int]:
    return list(range(num_micro_batches)) * num_steps


@pytest.mark.parametrize(("pp_size", "num_micro_batches", "num_steps"), SHAPES)
def test_the_formulas_are_what_a_replay_of_equal_stages_gives(
    pp_size: int, num_micro_batches: int, num_steps: int
) -> None:
    order = rounds(num_micro_batches, num_steps)
    times = [[1.0] * len(order)] * pp_size
    for flushed, bubble in [
        (True, flushed_bubble(pp_size, num_micro_batches)),
        (False, continuous_bubble(pp_size, num_micro_batches, num_steps)),
    ]:
        idle = 1 - len(order) / replay(times, order, flushed)
        assert idle == pytest.approx(bubble)


def test_many_steps_leave_no_bubble_where_each_stage_has_a_micro_batch() -> None:
    assert continuous_bubble(4, 4, 10_000) < 1e-3 < flushed_bubble(4, 4)
    assert continuous_bubble(4, 1, 10_000) == pytest.approx(3 / 4)


def test_the_slowest_stage_sets_the_pace_of_unequal_ones() -> None:
    order = rounds(3, 50)
    times = [[1.0] * 150, [3.0] * 150]
    # The first stage's first step is not hidden behind the second stage; all else is.
    assert replay(times, order, flushed=False) == 1 + 3 * 150
    # Flushed, it shows at every one of the 50 steps.
    assert replay(times, order, flushed=True) == 50 * (1 + 3 * 3)


def test_a_micro_batch_that_ends_early_is_not_waited_for() -> None:
    # The second runs for one step alone: rounds are found by the order, not by a count.
    assert replay([[1.0] * 4] * 2, [0, 1, 0, 0], flushed=False) == 2 + 2 + 2
    assert replay([[1.0] * 4] * 2, [0, 1, 0, 0], flushed=True) == 3 + 2 + 2


def test_the_bubble_of_stages_is_the_mean_of_their_idle_shares() -> None:
    order = rounds(2, 2)
    stages = [
        StageTimes([1.0] * 4, order, wait_s=1.0, total_s=5.0),
        StageTimes([2.0] * 4, order, wait_s=0.0, total_s=10.0),
    ]
    assert [stage.idle_share for stage in stages] == pytest.approx([0.2, 0.2])
    assert measured_bubble(stages) == pytest.approx(0.2)
    assert ideal_bubble(stages, flushed=False) == pytest.approx(1 - (4 + 8) / (2 * 9))
