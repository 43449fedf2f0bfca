"""All-reduces that others have published, against the shipped figures and the collectives' model.

No figure was fitted to these but the first. Machines of one kind differ by a half among themselves
(1 MiB over 8 H100: 32 and 42 us), and the shipped figures lie at the quick end: what is asked is
that none is off by more than a factor of two. Mutated to see it fail: NVLink 4's alpha_s times ten.
"""

from __future__ import annotations

from statistics import median

import pytest

from flashhead_topology.links import collective_time_s
from flashhead_topology.systems import load_system

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
TRITON_DISTRIBUTED = "github.com/ByteDance-Seed/Triton-distributed/issues/57"
AZURE = "github.com/Azure/AI-benchmarking-guide, ND {} results"


def from_bus_bandwidth(num_bytes: int, gb_per_s: float, ranks: int) -> float:
    """Microseconds of an all-reduce whose bus bandwidth nccl-tests gives."""
    return 2 * (ranks - 1) / ranks * num_bytes / gb_per_s / 1e3


PUBLISHED = [
    ("h100-infiniband", 8, 128, 19.19, TRITON_DISTRIBUTED),
    ("h100-infiniband", 8, 64 * KIB, 23.05, TRITON_DISTRIBUTED),
    ("h100-infiniband", 8, MIB, 32.42, TRITON_DISTRIBUTED),
    ("h100-infiniband", 8, 16 * MIB, 135.68, TRITON_DISTRIBUTED),
    ("h100-infiniband", 8, KIB, from_bus_bandwidth(KIB, 0.07, 8), AZURE.format("H100")),
    ("h100-infiniband", 8, MIB, from_bus_bandwidth(MIB, 43.70, 8), AZURE.format("H100")),
    ("h200-infiniband", 8, MIB, from_bus_bandwidth(MIB, 52.96, 8), AZURE.format("H200")),
    ("h200-infiniband", 8, GIB, from_bus_bandwidth(GIB, 467.58, 8), AZURE.format("H200")),
    ("a100-infiniband", 8, 64 * KIB, from_bus_bandwidth(64 * KIB, 2.70, 8), AZURE.format("A100")),
    ("a100-infiniband", 8, MIB, from_bus_bandwidth(MIB, 36.22, 8), AZURE.format("A100")),
    ("a100-infiniband", 8, GIB, from_bus_bandwidth(GIB, 228.10, 8), AZURE.format("A100")),
    ("a100-infiniband", 256, 8, 62.5, "github.com/NVIDIA/nccl/issues/652"),
    ("b200-infiniband", 4, 64 * KIB, from_bus_bandwidth(64 * KIB, 5.71, 4), AZURE.format("GB200")),
    ("b200-infiniband", 4, MIB, from_bus_bandwidth(MIB, 80.48, 4), AZURE.format("GB200")),
    ("h100-infiniband", 16, 8, 46.5, "H20, as NVLink 4: github.com/NVIDIA/nccl/issues/1244"),
    ("h100-ethernet", 16, GIB, from_bus_bandwidth(GIB, 216.5, 16), "NVIDIA/nccl/issues/2409"),
]
"""System, ranks, bytes, microseconds, where."""


def ratio(system: str, ranks: int, num_bytes: int, measured_us: float) -> float:
    """Predicted over measured."""
    levels = load_system(system).levels
    predicted_s = collective_time_s("all_reduce", num_bytes, tp_size=ranks, levels=levels)
    return predicted_s * 1e6 / measured_us


@pytest.mark.parametrize(("system", "ranks", "num_bytes", "measured_us", "where"), PUBLISHED)
def test_no_published_all_reduce_is_off_by_more_than_two(
    system: str, ranks: int, num_bytes: int, measured_us: float, where: str
) -> None:
    assert 0.5 < ratio(system, ranks, num_bytes, measured_us) < 2, where


def test_the_shipped_figures_are_those_of_a_good_machine() -> None:
    """What docs/concepts/cost-model.md says of them: most are faster than what was published."""
    ratios = [ratio(*row[:4]) for row in PUBLISHED]
    assert 0.6 < median(ratios) < 0.9
