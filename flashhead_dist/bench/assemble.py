"""From what was measured of one head to its record: derived figures, and which are measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from flashhead_dist.bench.agreement import Agreement
from flashhead_dist.bench.bandwidth import MemoryBandwidth, roofline_share
from flashhead_dist.bench.cell import HeadCell
from flashhead_dist.bench.records import Provenance, Record
from flashhead_topology.machine import Oversubscription

BASELINE = "dense_local_max"


@dataclass(frozen=True, kw_only=True)
class HeadFacts:
    """What is known of a head at one `tp_size`, whatever the batch size."""

    name: str
    tp_size: int
    weight_bytes_by_rank: tuple[int, ...]
    peak_bytes_by_rank: tuple[int | None, ...]
    peak_reason: str | None
    agreement: Agreement | None


def assemble_record(
    facts: HeadFacts,
    cell: HeadCell,
    batch_size: int,
    fit: Oversubscription,
    provenance: Provenance,
    *,
    bandwidth: MemoryBandwidth,
    alone_us: float | None,
    baseline_us: float | None,
) -> Record:
    """Make the record of one head in one cell.

    alone_us: latency of the same head at `tp_size` 1 and this batch size, where measured.
    baseline_us: latency of `dense_local_max` at this `tp_size` and batch size, where known.
    bandwidth: of the ranks' memory, measured as the cell's compute was.
    """
    median_us, projection = latency_us(cell)
    compute = cell.alone or cell.wall
    agreement, counted = facts.agreement, cell.counted
    senders = facts.tp_size * batch_size
    sent_bytes_per_row = cell.sent_bytes / batch_size
    counted_bytes_per_row = _each(counted.per_step if counted else None, senders)
    longest = max(range(facts.tp_size), key=compute.compute_us_by_rank.__getitem__)
    return Record(
        **asdict(provenance),
        head=facts.name,
        tp_size=facts.tp_size,
        batch_size=batch_size,
        measured=projection is None,
        oversubscribed=fit.oversubscribed,
        oversubscription=fit.reason,
        median_us=median_us,
        p10_us=cell.wall.p10_us if projection is None else None,
        p90_us=cell.wall.p90_us if projection is None else None,
        compute_us=compute.compute_us,
        compute_us_by_rank=list(compute.compute_us_by_rank),
        communication_us=(
            cell.wall.communication_us if projection is None else cell.projected_communication_us
        ),
        num_iterations=compute.num_iterations,
        projection=projection,
        wall_median_us=cell.wall.median_us,
        wall_p10_us=cell.wall.p10_us,
        wall_p90_us=cell.wall.p90_us,
        split=cell.split,
        num_collectives=cell.num_collectives,
        payload_bytes_per_row=cell.payload_bytes / batch_size,
        sent_bytes_per_row=sent_bytes_per_row,
        counted_bytes_per_row=counted_bytes_per_row,
        counted_bytes_per_row_least=_each(counted.least if counted else None, senders),
        counted_bytes_per_row_greatest=_each(counted.greatest if counted else None, senders),
        counted_reason=counted.reason if counted else "one rank: nothing is sent",
        protocol_bytes_per_row=(
            None if counted_bytes_per_row is None else counted_bytes_per_row - sent_bytes_per_row
        ),
        device_counts=list(cell.device_counts),
        device_counts_reason=cell.device_counts_reason,
        weight_bytes_per_rank=max(facts.weight_bytes_by_rank),
        total_weight_bytes=sum(facts.weight_bytes_by_rank),
        weight_bytes_by_rank=list(facts.weight_bytes_by_rank),
        peak_bytes_per_rank=_greatest(facts.peak_bytes_by_rank),
        peak_bytes_by_rank=list(facts.peak_bytes_by_rank),
        peak_reason=facts.peak_reason,
        workspace_bytes_per_rank=cell.workspace_bytes,
        read_bytes_by_rank=list(cell.read_bytes_by_rank),
        memory_bandwidth_bytes_per_s_by_rank=list(bandwidth.bytes_per_s_by_rank),
        memory_bandwidth_method=bandwidth.method,
        roofline_share=roofline_share(
            cell.read_bytes_by_rank[longest],
            compute.compute_us_by_rank[longest],
            bandwidth.bytes_per_s_by_rank[longest],
        ),
        top1_agreement=agreement.overall if agreement else None,
        top1_agreement_worst_source=agreement.worst if agreement else None,
        worst_source=agreement.worst_source if agreement else None,
        num_worst_source_states=agreement.num_worst_states if agreement else None,
        num_agreement_states=agreement.num_states if agreement else 0,
        speedup_over_dense_local_max=_ratio(baseline_us, median_us),
        scaling_efficiency=_ratio(alone_us, median_us, facts.tp_size),
    )


def latency_us(cell: HeadCell) -> tuple[float | None, str | None]:
    """The latency of a cell, and how it was projected; None for that where it was measured."""
    if cell.alone is None:
        return cell.wall.median_us, None
    if cell.projected_communication_us is None:
        return None, (
            "none: the slowest rank's compute was measured alone, but no exchange could be timed, "
            "since not even two ranks fit this machine"
        )
    return cell.alone.compute_us + cell.projected_communication_us, (
        "the slowest rank's compute measured alone, plus the ring model of exchanges with "
        "constants timed at the largest tp_size that fits this machine"
    )


def find_median_us(
    records: Iterable[Record], head: str, tp_size: int, batch_size: int
) -> float | None:
    """Latency of an earlier record of the run, or None."""
    key = (head, tp_size, batch_size)
    for record in records:
        if (record.head, record.tp_size, record.batch_size) == key:
            return record.median_us
    return None


def _each(total: float | None, senders: int) -> float | None:
    return None if total is None else total / senders


def _greatest(values: Sequence[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return max(known) if len(known) == len(values) else None


def _ratio(numerator: float | None, denominator: float | None, times: int = 1) -> float | None:
    if numerator is None or denominator is None or denominator <= 0:
        return None
    return numerator / (times * denominator)
