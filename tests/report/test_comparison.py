"""Two runs against each other: changes beyond the noise, and those that are not."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashhead_dist.bench.records import Record
from flashhead_dist.report.comparison import Change, compare_runs, differences, latency_noise
from flashhead_dist.report.runs import load_runs
from flashhead_dist.report.sections.compared import comparison_section, noise_bar
from tests.report.made_up import changed, faster, golden, write_run


def compared(
    tmp_path: Path, after: list[Record], before: list[Record] | None = None
) -> list[Change]:
    folders = [write_run(tmp_path / "before", before), write_run(tmp_path / "after", after)]
    return compare_runs(*load_runs(folders))


def verdicts(changes: list[Change], figure: str) -> dict[tuple[str, int, int], str]:
    return {(c.head, c.tp_size, c.batch_size): c.verdict for c in changes if c.figure == figure}


def test_noise_is_the_width_of_both_runs() -> None:
    one = golden()[0]
    assert (one.p10_us, one.median_us, one.p90_us) == (45000, 50000, 60000)
    assert latency_noise(one, one) == pytest.approx(2**0.5 * 0.15)


def test_the_same_run_again_changed_nothing(tmp_path: Path) -> None:
    assert {change.verdict for change in compared(tmp_path, golden())} == {"same"}


@pytest.mark.parametrize(
    ("share", "verdict"),
    [(0.5, "better"), (0.9, "within noise"), (1.1, "within noise"), (1.5, "worse")],
)
def test_a_latency_changes_beyond_what_iterations_scatter_by(
    tmp_path: Path, share: float, verdict: str
) -> None:
    """Noise of the golden records is 24 %; a rule without noise would mark 0.9 and 1.1."""
    found = verdicts(compared(tmp_path, faster(share, "flashhead")), "median_us")
    assert {v for (head, _, _), v in found.items() if head == "flashhead"} == {verdict}
    assert {v for (head, _, _), v in found.items() if head != "flashhead"} == {"same"}


def test_projected_latencies_are_not_compared(tmp_path: Path) -> None:
    found = verdicts(compared(tmp_path, faster(0.5)), "median_us")
    assert {tp_size for _, tp_size, _ in found} == {1, 2}


def test_agreement_has_a_better_side_and_no_noise(tmp_path: Path) -> None:
    before = changed(lambda r: {"top1_agreement": 0.990})
    after = changed(lambda r: {"top1_agreement": 0.991 if r.head == "flashhead" else 0.989})
    found = verdicts(compared(tmp_path, after, before), "top1_agreement")
    assert found["flashhead", 1, 1] == "better"
    assert found["dense_gather", 1, 1] == "worse"
    # Once a size, not once a batch.
    assert {batch_size for _, _, batch_size in found} == {1}


def test_counted_bytes_scatter_as_their_bursts_did(tmp_path: Path) -> None:
    def bytes_(share: float) -> list[Record]:
        return changed(
            lambda r: {
                "counted_bytes_per_row": 100.0 * share,
                "counted_bytes_per_row_least": 95.0 * share,
                "counted_bytes_per_row_greatest": 105.0 * share,
            }
        )

    name = "counted_bytes_per_row"
    little = verdicts(compared(tmp_path / "little", bytes_(1.1), bytes_(1.0)), name)
    much = verdicts(compared(tmp_path / "much", bytes_(1.5), bytes_(1.0)), name)
    assert set(little.values()) == {"within noise"}
    assert set(much.values()) == {"worse"}


def test_a_peak_that_moves_by_a_few_megabytes_is_noise(tmp_path: Path) -> None:
    def peaks(num_bytes: int) -> list[Record]:
        return changed(lambda r: {"peak_bytes_per_rank": num_bytes})

    name = "peak_bytes_per_rank"
    small = verdicts(compared(tmp_path / "small", peaks(26_000_000), peaks(34_000_000)), name)
    large = verdicts(compared(tmp_path / "large", peaks(500_000_000), peaks(400_000_000)), name)
    assert set(small.values()) == {"within noise"}
    assert set(large.values()) == {"worse"}


def test_noise_without_end_does_not_hide_the_changes(tmp_path: Path) -> None:
    """One iteration in ten that takes fifty times as long makes a bar of thousands of per cent."""
    wild = changed(lambda r: {"p90_us": 50 * r.p90_us} if r.p90_us else {})
    runs = load_runs([write_run(tmp_path / "one", wild), write_run(tmp_path / "two", wild)])
    changes = compare_runs(*runs)
    worst = max(changes, key=lambda change: change.noise)
    assert worst.noise > 20
    assert noise_bar(worst) == pytest.approx((1 / (1 + worst.noise) - 1, worst.noise))
    (plot, _) = comparison_section(runs, changes).plots
    assert "+100 %" in plot.svg
    assert "+200 %" not in plot.svg


def test_what_runs_differ_in_is_told(tmp_path: Path) -> None:
    other = changed(lambda r: {"commit": "0123456789", "versions": {"torch": "2.12.0"}})
    runs = load_runs([write_run(tmp_path / "one"), write_run(tmp_path / "two", other)])
    found = differences(*runs)
    assert "commit: abcdef0123 → 0123456789" in found
    assert "torch: 2.13.0 → 2.12.0" in found
    assert differences(runs[0], runs[0]) == []


def test_a_change_that_all_heads_share_is_said_to_be_the_machines(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / "one"), write_run(tmp_path / "two", faster(1.2))]
    runs = load_runs(folders)
    section = comparison_section(runs, compare_runs(*runs))
    assert any("median change of latency is +20.0 %" in note for note in section.notes)


def test_runs_without_a_common_cell_say_so(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / "one", [r for r in golden() if r.batch_size == 1]),
        write_run(tmp_path / "two", [r for r in golden() if r.batch_size == 4]),
    ]
    runs = load_runs(folders)
    section = comparison_section(runs, compare_runs(*runs))
    assert section.missing is not None
    assert section.plots == ()
