"""What --fail-if asks, and that a condition which cannot fail is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashhead_dist.errors import UserError
from flashhead_dist.report.comparison import compare_runs
from flashhead_dist.report.conditions import Failure, check_conditions, parse_condition
from flashhead_dist.report.runs import load_runs
from tests.report.made_up import changed, faster, run_of, write_run


def failures(folder: Path, *conditions: str, **more: object) -> list[Failure]:
    run = run_of(folder, **more)  # type: ignore[arg-type]
    return check_conditions([parse_condition(text) for text in conditions], [run], [])


def test_a_condition_that_holds_fails_with_the_figure_and_its_cell(tmp_path: Path) -> None:
    records = changed(
        lambda r: (
            {"top1_agreement": 0.99}
            if (r.head, r.tp_size, r.batch_size) == ("flashhead", 2, 4)
            else {}
        )
    )
    (failure,) = failures(tmp_path / "run", "flashhead.top1_agreement<0.995", records=records)
    assert "flashhead.top1_agreement is 0.99 at tp 2, batch 4 (of 6 figures checked)" in str(
        failure
    )


def test_a_condition_that_does_not_hold_passes(tmp_path: Path) -> None:
    assert failures(tmp_path / "run", "dense_gather.top1_agreement<0.995") == []


def test_the_figure_that_went_furthest_is_told(tmp_path: Path) -> None:
    (failure,) = failures(tmp_path / "run", "flashhead.median_us > 3000")
    assert (failure.figure, failure.tp_size, failure.batch_size) == (8000.0, 1, 4)


def test_single_sizes_can_be_asked_for(tmp_path: Path) -> None:
    (failure,) = failures(tmp_path / "run", "flashhead.median_us@tp=2@batch=1>=2150")
    assert failure.num_figures == 1
    assert failures(tmp_path / "other", "flashhead.median_us@tp=2@batch=1>2150") == []


def test_a_projection_is_not_taken_for_a_measurement(tmp_path: Path) -> None:
    """The projected latency at tp 8 is the least: it would fail the first of the two."""
    assert failures(tmp_path / "run", "flashhead.median_us<2000") == []
    (failure,) = failures(tmp_path / "other", "flashhead.projected_median_us<2000")
    assert failure.tp_size == 8


@pytest.mark.parametrize(
    ("condition", "reason"),
    [
        ("flashhed.top1_agreement<0.9", "the heads measured are dense_gather"),
        ("flashhead.median_us@tp=3>1", "no cell that was measured has it"),
        ("flashhead.change_median_us>0.1", "a change needs two runs"),
    ],
)
def test_a_condition_that_meets_no_figure_is_a_mistake(
    tmp_path: Path, condition: str, reason: str
) -> None:
    with pytest.raises(UserError, match=reason):
        failures(tmp_path / "run", condition)


@pytest.mark.parametrize(
    "condition",
    ["flashhead.top1_agreement", "top1_agreement<1", "flashhead.top1<0.9", "flashhead.seed<1",
     "flashhead.median_us<1e", "flashhead.projected_top1_agreement<1", "flashhead.device<1",
     "flashhead.change_compute_us>1", "flashhead.median_us=1", ""],
)  # fmt: skip
def test_what_is_no_condition_is_refused(condition: str) -> None:
    with pytest.raises(UserError, match="--fail-if"):
        parse_condition(condition)


def test_a_change_within_the_noise_fails_nothing(tmp_path: Path) -> None:
    before = write_run(tmp_path / "before")
    for name, share, holds in (("little", 1.05, False), ("much", 1.8, True)):
        runs = load_runs([before, write_run(tmp_path / name, faster(share, "flashhead"))])
        condition = parse_condition("flashhead.change_median_us>0.01")
        found = check_conditions([condition], runs, compare_runs(*runs))
        assert bool(found) is holds
