"""Peak memory counts what was held on the way, even where it is gone at the end."""

from __future__ import annotations

import pytest
import torch

from flashhead_dist.bench.memory import PeakMemory, workspace_bytes

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


def test_a_workspace_is_what_a_step_holds_beyond_what_was_held(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of 1,000 bytes of weights and a step that takes 300 and gives them back."""
    peak = {"bytes": 5_000}

    def step() -> None:
        peak["bytes"] = max(peak["bytes"], 1_300)

    for name, value in {
        "synchronize": lambda device: None,
        "reset_peak_memory_stats": lambda device: peak.update(bytes=1_000),
        "memory_allocated": lambda device: 1_000,
        "max_memory_allocated": lambda device: peak["bytes"],
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    assert workspace_bytes(torch.device("cuda"), step) == 300


def test_a_cpu_knows_no_workspace_and_runs_no_step() -> None:
    assert workspace_bytes(torch.device("cpu"), lambda: pytest.fail("it ran")) is None
