"""Peak memory counts what was held on the way, even where it is gone at the end."""

from __future__ import annotations

import torch

from flashhead_dist.measure.memory import PeakMemory

MEGABYTE = 1_000_000


def test_a_passing_tensor_shows_in_the_peak() -> None:
    memory = PeakMemory(torch.device("cpu"))
    passing = torch.ones(50 * MEGABYTE // 4)
    del passing
    peak = memory.read()
    assert peak.peak_bytes is not None, peak.reason
    assert 45 * MEGABYTE < peak.peak_bytes < 100 * MEGABYTE


def test_a_peak_of_earlier_work_does_not_count() -> None:
    earlier = torch.ones(100 * MEGABYTE // 4)
    del earlier
    peak = PeakMemory(torch.device("cpu")).read()
    assert peak.peak_bytes is not None, peak.reason
    assert peak.peak_bytes < 20 * MEGABYTE
