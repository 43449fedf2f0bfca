"""What the ranks' GPUs count, summed over ranks: a rank that does not know makes it unknown."""

from __future__ import annotations

from flashhead_dist.bench.wire import DeviceCount, sum_over_ranks
from flashhead_profiles.counters import MEMORY, NVLINK_SENT, NVLINK_SENT_GPM, PCIE_SENT, Counted


def test_counts_are_bytes_of_one_step_over_all_ranks_beside_the_analytic_ones() -> None:
    ranks = [
        {NVLINK_SENT: Counted(4000.0), NVLINK_SENT_GPM: Counted(5000.0), MEMORY: Counted(1e9)},
        {NVLINK_SENT: Counted(6000.0), NVLINK_SENT_GPM: Counted(7000.0), MEMORY: Counted(3e9)},
    ]
    links, totals, memory = sum_over_ranks(ranks, 10, sent_bytes=800.0, read_bytes=300)
    assert links == DeviceCount(
        name=NVLINK_SENT, bytes_per_step=1000.0, analytic_bytes_per_step=800.0, reason=None
    )
    assert (totals.name, totals.bytes_per_step) == (NVLINK_SENT_GPM, 1200.0)
    assert totals.analytic_bytes_per_step == 800.0
    assert (memory.bytes_per_step, memory.analytic_bytes_per_step) == (4e8, 300)


def test_a_count_that_one_rank_misses_is_missing_with_its_reason() -> None:
    """Summing what is known would give half of what two ranks sent."""
    ranks = [{PCIE_SENT: Counted(4000.0)}, {PCIE_SENT: Counted(None, "wrapped")}]
    (count,) = sum_over_ranks(ranks, 10, sent_bytes=800.0, read_bytes=300)
    assert (count.bytes_per_step, count.reason) == (None, "wrapped")
