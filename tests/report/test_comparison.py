"""Two runs against each other, and what --fail-if asks of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from flashhead_dist.bench.records import Record
from flashhead_dist.errors import UserError
from flashhead_dist.report.comparison import (
    check_conditions,
    compare_runs,
    comparison_section,
    differences,
    noise_bar,
    parse_condition,
)
from flashhead_dist.report.runs import load_runs
from tests.report.run_folders import changed, faster, golden, run_of, write_run

pytest.importorskip("matplotlib")


def compared(
    tmp_path: Path, after: list[Record], before: list[Record] | None = None
) -> pd.DataFrame:
    folders = [write_run(tmp_path / "before", before), write_run(tmp_path / "after", after)]
    return compare_runs(*load_runs(folders))


def verdicts(changes: pd.DataFrame, figure: str, **cell: object) -> set[str]:
    own = changes[changes.figure == figure]
    for key, value in cell.items():
        own = own[own[key] == value]
    assert len(own)
    return set(own.verdict)


def test_the_same_run_again_changed_nothing(tmp_path: Path) -> None:
    changes = compared(tmp_path, golden())
    assert set(changes.verdict) == {"same"}
    # (60,000 - 45,000) / 50,000 / 2 of each run, in quadrature on a logarithm.
    row = changes[(changes.figure == "median_us") & (changes["head"] == "dense_gather")].iloc[0]
    assert row.before == 50_000
    assert row.noise == pytest.approx(2.718281828 ** (2**0.5 * 0.15) - 1)


@pytest.mark.parametrize(
    ("share", "verdict"),
    [(0.5, "better"), (0.9, "within noise"), (1.1, "within noise"), (1.5, "worse")],
)
def test_a_latency_changes_beyond_what_iterations_scatter_by(
    tmp_path: Path, share: float, verdict: str
) -> None:
    """Noise of the golden records is 24 %; a rule without noise would mark 0.9 and 1.1."""
    changes = compared(tmp_path, faster(share, "flashhead"))
    assert verdicts(changes, "median_us", head="flashhead") == {verdict}
    assert verdicts(changes, "median_us", head="dense_gather") == {"same"}


def test_projected_latencies_are_not_compared(tmp_path: Path) -> None:
    changes = compared(tmp_path, faster(0.5))
    assert set(changes[changes.figure == "median_us"].tp_size) == {1, 2}


def test_agreement_has_a_better_side_and_no_noise(tmp_path: Path) -> None:
    before = changed(lambda r: {"top1_agreement": 0.990})
    after = changed(lambda r: {"top1_agreement": 0.991 if r.head == "flashhead" else 0.989})
    changes = compared(tmp_path, after, before)
    assert verdicts(changes, "top1_agreement", head="flashhead") == {"better"}
    assert verdicts(changes, "top1_agreement", head="dense_gather") == {"worse"}
    # Once a size, not once a batch.
    assert len(changes[changes.figure == "top1_agreement"]) == 9


def bytes_of(share: float) -> list[Record]:
    names = ("counted_bytes_per_row", "counted_bytes_per_row_least")
    values = dict.fromkeys(names, 100.0 * share) | {"counted_bytes_per_row_greatest": 110.0 * share}
    return changed(lambda r: values)


def peaks_of(megabytes: int) -> list[Record]:
    return changed(lambda r: {"peak_bytes_per_rank": megabytes * 1_000_000})


@pytest.mark.parametrize(
    ("figure", "before", "after", "verdict"),
    [
        ("counted_bytes_per_row", bytes_of(1.0), bytes_of(1.1), "within noise"),
        ("counted_bytes_per_row", bytes_of(1.0), bytes_of(1.5), "worse"),
        ("peak_bytes_per_rank", peaks_of(34), peaks_of(26), "within noise"),
        ("peak_bytes_per_rank", peaks_of(400), peaks_of(500), "worse"),
    ],
)
def test_counts_scatter_as_their_bursts_and_peaks_by_megabytes(
    tmp_path: Path, figure: str, before: list[Record], after: list[Record], verdict: str
) -> None:
    assert verdicts(compared(tmp_path, after, before), figure) == {verdict}


def test_noise_without_end_does_not_hide_the_changes(tmp_path: Path) -> None:
    """One iteration in ten that takes fifty times as long makes a bar of thousands of per cent."""
    wild = changed(lambda r: {"p90_us": 50 * r.p90_us} if r.p90_us else {})
    runs = load_runs([write_run(tmp_path / "one", wild), write_run(tmp_path / "two", wild)])
    changes = compare_runs(*runs)
    noise = changes.noise.max()
    assert noise > 20
    assert noise_bar(0.0, noise) == pytest.approx((1 / (1 + noise) - 1, noise))
    chart, _ = comparison_section(runs, changes).charts
    assert "+100 %" in chart
    assert "+200 %" not in chart


def test_differences_of_runs_are_their_provenance(tmp_path: Path) -> None:
    other = changed(lambda r: {"commit": "0123456789", "versions": {"torch": "2.12.0"}})
    runs = load_runs([write_run(tmp_path / "one"), write_run(tmp_path / "two", other)])
    assert {"commit: abcdef0123 → 0123456789", "torch: 2.13.0 → 2.12.0"} <= {*differences(*runs)}
    assert differences(runs[0], runs[0]) == []


def test_a_change_that_all_heads_share_is_reported(tmp_path: Path) -> None:
    runs = load_runs([write_run(tmp_path / "one"), write_run(tmp_path / "two", faster(1.2))])
    assert any("+20.0 %" in note for note in comparison_section(runs, compare_runs(*runs)).notes)


def test_runs_without_a_common_cell_have_no_comparison(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / str(size), [r for r in golden() if r.batch_size == size])
        for size in (1, 4)
    ]
    runs = load_runs(folders)
    assert comparison_section(runs, compare_runs(*runs)).missing


def failures(folder: Path, condition: str, **more: Any) -> list[str]:
    changes = pd.DataFrame()
    return check_conditions([parse_condition(condition)], [run_of(folder, **more)], changes)


@pytest.mark.parametrize(
    ("condition", "figure"),
    [
        ("dense_gather.top1_agreement<0.995", None),
        ("flashhead.median_us > 3000", "8000 at tp 1, batch 4 (of 4 figures checked)"),
        ("flashhead.median_us@tp=2@batch=1>=2150", "2150 at tp 2, batch 1 (of 1"),
        ("flashhead.median_us@tp=2@batch=1>2150", None),
        # The projected latency at tp 8 is the least: it would fail the first of the two.
        ("flashhead.median_us<2000", None),
        ("flashhead.projected_median_us<2000", "1550 at tp 8, batch 1"),
        ("flashhead.compute_us@tp=8>0", "at tp 8"),
    ],
)
def test_a_condition_that_holds_names_the_furthest_figure(
    tmp_path: Path, condition: str, figure: str | None
) -> None:
    found = failures(tmp_path / "run", condition)
    if figure is None:
        assert found == []
    else:
        assert figure in found[0]


@pytest.mark.parametrize(
    ("condition", "reason"),
    [
        ("flashhed.top1_agreement<0.9", "the heads measured are dense_gather"),
        ("flashhead.median_us@tp=3>1", "no measured cell has it"),
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
     "flashhead.change_compute_us>1", "flashhead.median_us=1", ""]
)  # fmt: skip
def test_what_is_no_condition_is_refused(condition: str) -> None:
    with pytest.raises(UserError, match="--fail-if"):
        parse_condition(condition)


@pytest.mark.parametrize(("share", "holds"), [(1.05, False), (1.8, True)])
def test_a_change_within_the_noise_fails_nothing(tmp_path: Path, share: float, holds: bool) -> None:
    after = write_run(tmp_path / "after", faster(share, "flashhead"))
    runs = load_runs([write_run(tmp_path / "before"), after])
    condition = parse_condition("flashhead.change_median_us>0.01")
    assert bool(check_conditions([condition], runs, compare_runs(*runs))) is holds
