"""What limits a head: the gain of more ranks, and what the exchange takes back of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flashhead_dist.bench.records import Record
from flashhead_dist.report.gain import gains, turning_point
from flashhead_dist.report.verdict import verdict
from tests.report.made_up import changed, run_of


def with_steps(times: dict[int, tuple[float, float]]) -> list[Record]:
    """flashhead's (compute, median) by tp_size at every batch size, spread by 1 %."""

    def change(record: Record) -> dict[str, Any]:
        compute, median = times[record.tp_size]
        ends = {"p10_us": median * 0.99, "p90_us": median * 1.01} if record.measured else {}
        found: dict[str, Any] = {"compute_us": compute, "median_us": median} | ends
        return found if record.head == "flashhead" else {}

    return changed(change)


def test_what_is_saved_and_taken_adds_up_to_the_steps(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", with_steps({1: (1000, 1000), 2: (600, 700), 8: (200, 800)}))
    first, second = gains(run, "flashhead", 1)
    assert (first.before, first.after, first.saved_us, first.taken_us) == (1, 2, 400, 100)
    assert (first.eaten, first.projected, first.within_noise) == (False, False, False)
    assert (second.before, second.after, second.saved_us, second.taken_us) == (2, 8, 400, 500)
    assert (second.eaten, second.projected, second.within_noise) == (True, True, None)


@pytest.mark.parametrize(
    ("times", "turn"),
    [
        ({1: (1000, 1000), 2: (600, 700), 8: (200, 800)}, (2, 8)),
        ({1: (1000, 1000), 2: (600, 700), 8: (200, 300)}, None),
        ({1: (1000, 1000), 2: (600, 1200), 8: (200, 1300)}, (1, 2)),
        # Slower on two ranks, and not as fast again on eight: a search for the first fall fails.
        ({1: (1000, 1000), 2: (600, 1400), 8: (200, 1100)}, (1, 2)),
    ],
)
def test_the_gain_ends_where_a_step_is_shortest(
    tmp_path: Path, times: dict[int, tuple[float, float]], turn: tuple[int, int] | None
) -> None:
    found = turning_point(run_of(tmp_path / "run", with_steps(times)), "flashhead", 1)
    assert (found and (found.before, found.after)) == turn


def test_a_step_that_is_longer_within_the_noise_says_so(tmp_path: Path) -> None:
    records = with_steps({1: (1000, 1000), 2: (600, 1001), 8: (0, 0)})
    run = run_of(tmp_path / "run", [r for r in records if r.tp_size < 8])
    found = turning_point(run, "flashhead", 1)
    assert found is not None
    assert found.eaten
    assert found.within_noise
    assert "within the noise of the next size; from 2 ranks on" in verdict(run)[0]


def test_compute_that_does_not_fall_has_no_gain_to_eat(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", with_steps({1: (100, 100), 2: (600, 700), 8: (200, 800)}))
    assert "more ranks gain nothing, as compute does not fall" in verdict(run)[0]


def test_the_verdict_says_so_in_words(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", with_steps({1: (1000, 1000), 2: (600, 700), 8: (200, 800)}))
    first, second, dense = verdict(run)
    assert "flashhead at batch 1: on one rank a step takes 1,000 µs" in first
    assert "From 1 to 2 ranks compute falls by 400 µs" in first
    assert "take 100 µs back (25 %)" in first
    assert "PROJECTED from 2 to 8 ranks compute falls by 400 µs" in first
    assert first.endswith(
        "PROJECTED, a step is shortest on 2 ranks; from 8 ranks on, the fixed cost of an exchange "
        "that carries 8 bytes a row eats the gain."
    )
    assert "batch 4" in second
    assert dense.startswith("dense_local_max at batch 1")


def test_a_run_without_one_rank_has_no_verdict(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", [r for r in changed(lambda r: {}) if r.tp_size > 1])
    assert verdict(run) == []
