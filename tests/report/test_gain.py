"""What limits a head: the gain of more ranks, and what the exchange takes back of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flashhead_dist.measure.records import Record
from flashhead_dist.report.gain import eaten_from, gains
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


def test_the_exchange_eats_the_gain_from_the_size_on_that_makes_steps_longer(
    tmp_path: Path,
) -> None:
    found = gains(
        run_of(tmp_path / "a", with_steps({1: (1000, 1000), 2: (600, 700), 8: (200, 800)})),
        "flashhead",
        1,
    )
    eaten = eaten_from(found)
    assert eaten is not None
    assert eaten.after == 8
    never = run_of(tmp_path / "b", with_steps({1: (1000, 1000), 2: (600, 700), 8: (200, 300)}))
    assert eaten_from(gains(never, "flashhead", 1)) is None
    at_once = run_of(tmp_path / "c", with_steps({1: (1000, 1000), 2: (600, 1200), 8: (200, 1300)}))
    eaten = eaten_from(gains(at_once, "flashhead", 1))
    assert eaten is not None
    assert eaten.after == 2


def test_a_step_that_is_longer_within_the_noise_does_not_count(tmp_path: Path) -> None:
    run = run_of(
        tmp_path / "run",
        [r for r in with_steps({1: (1000, 1000), 2: (600, 1001), 8: (0, 0)}) if r.tp_size < 8],
    )
    (gain,) = gains(run, "flashhead", 1)
    assert gain.eaten
    assert gain.within_noise
    assert eaten_from([gain]) is None


def test_the_verdict_says_so_in_words(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", with_steps({1: (1000, 1000), 2: (600, 700), 8: (200, 800)}))
    first, second, dense = verdict(run)
    assert "flashhead at batch 1: on one rank a step takes 1,000 µs" in first
    assert "From 1 to 2 ranks compute falls by 400 µs" in first
    assert "take 100 µs back (25 %)" in first
    assert "PROJECTED from 2 to 8 ranks compute falls by 400 µs" in first
    assert "From 8 ranks on the fixed cost of the exchange" in first
    assert first.endswith("eats the gain (PROJECTED).")
    assert "batch 4" in second
    assert dense.startswith("dense_local_max at batch 1")


def test_a_run_without_one_rank_has_no_verdict(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", [r for r in changed(lambda r: {}) if r.tp_size > 1])
    assert verdict(run) == []
