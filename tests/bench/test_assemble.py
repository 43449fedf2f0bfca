"""From a cell to a record: what is projected, what is unknown, and what follows from what."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from flashhead_dist.bench.cell import HeadCell
from flashhead_dist.bench.memory import MemoryBandwidth
from flashhead_dist.bench.records import Provenance, Record, read_records
from flashhead_dist.bench.split import RankParts, split_together
from flashhead_dist.bench.sweep import HeadFacts, assemble_record
from flashhead_dist.bench.timer import Latency
from flashhead_profiles.counters import CountedBytes
from flashhead_topology.machine import Oversubscription

DATA = Path(__file__).parents[1] / "report" / "data" / "records.jsonl"
WALL = Latency(5000.0, 4000.0, 9000.0, 1000.0, 4000.0, (900.0, 1000.0), 7)
ALONE = Latency(300.0, 290.0, 310.0, 300.0, 0.0, (300.0, 280.0), 9)
FITS = Oversubscription(False, "2 ranks on 2 cores: a core for every thread")
SPLIT = split_together([RankParts((1.0,), (0.0,), (1.0,), ((),))] * 2, "how")
BANDWIDTH = MemoryBandwidth((1e9, 2e9), "how")
DOES_NOT_FIT = Oversubscription(True, "2 ranks on 1 core")


def cell(*, alone: Latency | None = None, projected: float | None = None) -> HeadCell:
    return HeadCell(
        wall=WALL,
        isolated=alone,
        projected_communication_us=projected,
        num_collectives=1,
        payload_bytes=32.0,
        sent_bytes=32.0,
        counted=CountedBytes(8000.0, 7600.0, 9600.0, 5),
        split=SPLIT,
        read_bytes_by_rank=(400_000, 300_000),
        workspace_bytes=4_096,
    )


def record(found: HeadCell, fit: Oversubscription) -> Record:
    golden = read_records(DATA)[0]
    provenance = {f.name: getattr(golden, f.name) for f in dataclasses.fields(Provenance)}
    facts = HeadFacts(
        name="flashhead",
        tp_size=2,
        weight_bytes_by_rank=(510, 490),
        peak_bytes_by_rank=(7, None),
        peak_reason="unknown",
        agreement=None,
    )
    return assemble_record(
        facts,
        found,
        4,
        fit,
        Provenance(**provenance),
        bandwidth=BANDWIDTH,
        one_rank_us=6000.0,
        baseline_us=10_000.0,
    )


def test_what_fits_is_what_the_clock_saw() -> None:
    found = record(cell(), FITS)
    assert found.measured
    assert (found.median_us, found.p10_us, found.p90_us) == (5000.0, 4000.0, 9000.0)
    assert (found.compute_us, found.communication_us) == (1000.0, 4000.0)
    assert found.speedup_over_dense_local_max == 2.0
    assert found.scaling_efficiency == pytest.approx(0.6)
    assert found.num_iterations == 7


def test_what_does_not_fit_is_compute_alone_plus_the_model() -> None:
    found = record(cell(alone=ALONE, projected=200.0), DOES_NOT_FIT)
    assert not found.measured
    assert found.projection is not None
    assert found.median_us == 500.0
    assert (found.p10_us, found.p90_us) == (None, None)
    assert (found.compute_us, found.communication_us) == (300.0, 200.0)
    assert found.compute_us_by_rank == [300.0, 280.0]
    assert found.wall_median_us == 5000.0
    assert found.speedup_over_dense_local_max == 20.0


def test_without_a_model_nothing_is_projected() -> None:
    found = record(cell(alone=ALONE), DOES_NOT_FIT)
    assert not found.measured
    assert found.median_us is None
    assert found.communication_us is None
    assert found.speedup_over_dense_local_max is None
    assert found.scaling_efficiency is None
    assert found.compute_us == 300.0


def test_bytes_are_a_rank_and_row() -> None:
    found = record(cell(), FITS)
    assert found.payload_bytes_per_row == 8.0
    assert found.counted_bytes_per_row == 1000.0
    assert found.counted_bytes_per_row_least == 950.0
    assert found.counted_bytes_per_row_greatest == 1200.0
    assert found.protocol_bytes_per_row == 992.0
    assert found.device_counts == []
    assert found.device_counts_reason is not None


def test_weights_are_the_largest_ranks_and_the_sum() -> None:
    found = record(cell(), FITS)
    assert (found.weight_bytes_per_rank, found.total_weight_bytes) == (510, 1000)
    assert found.weight_bytes_by_rank == [510, 490]
    assert found.workspace_bytes_per_rank == 4_096


def test_a_peak_that_one_rank_does_not_know_is_not_known() -> None:
    found = record(cell(), FITS)
    assert (found.peak_bytes_per_rank, found.peak_bytes_by_rank) == (None, [7, None])


def test_the_roofline_is_that_of_the_rank_that_computes_longest() -> None:
    """Rank 1: 300 kB in 1000 us at 2 GB/s. Rank 0 alone: 400 kB in 300 us at 1 GB/s."""
    assert record(cell(), FITS).roofline_share == pytest.approx(0.15)
    alone = record(cell(alone=ALONE, projected=200.0), DOES_NOT_FIT)
    assert alone.roofline_share == pytest.approx(400 / 300)
    assert alone.memory_bandwidth_bytes_per_s_by_rank == [1e9, 2e9]
    assert alone.read_bytes_by_rank == [400_000, 300_000]
