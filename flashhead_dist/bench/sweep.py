"""The sweep: heads over tensor-parallel sizes and batch sizes, one record each.

Groups are the first 1, 2, 4, ... ranks; the ranks outside a group sleep in the store until it is
done. All heads of a group are loaded together, so that their steps can be interleaved, and dropped
before the next group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from flashhead_dist.bench.agreement import Agreement, best_tokens, top1_agreement
from flashhead_dist.bench.cell import Effort, HeadCell, measure_cell
from flashhead_dist.bench.control import Control
from flashhead_dist.bench.crossover import Crossover, settle_crossover
from flashhead_dist.bench.links import ExchangeCost, time_exchange_costs
from flashhead_dist.bench.memory import (
    MemoryBandwidth,
    Peak,
    PeakMemory,
    measure_bandwidth,
    release_memory,
    roofline_share,
)
from flashhead_dist.bench.records import Provenance, Record
from flashhead_dist.bench.timer import capture_note
from flashhead_dist.bench.wire import WireCounter
from flashhead_dist.evaluate.workload import Workload
from flashhead_dist.heads.base import Head
from flashhead_dist.heads.flashhead import FlashHeadAuto
from flashhead_dist.heads.flashhead_escalate import Escalation
from flashhead_dist.heads.registry import BASELINE, build_head, needs_index
from flashhead_dist.models import ModelSource
from flashhead_dist.parallel import Operation, TensorParallel
from flashhead_kernels.cpu_threads import compute_threads
from flashhead_kernels.dispatch import ops_for
from flashhead_topology.machine import Oversubscription

_NUM_BATCHES = 16


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to measure; the same on every rank."""

    heads: Sequence[str]
    tp_sizes: Sequence[int]
    batch_sizes: Sequence[int]
    dtype: torch.dtype
    num_probes: int | None = None
    alpha: float | None = None
    escalation: Escalation | None = None
    """Of flashhead_escalate; the index's own where None."""
    effort: Effort = field(default_factory=Effort)
    num_cores: int
    """Cores of this host, for loading: heads are built with all of them and timed with their own
    threads."""
    fit: Callable[[int], Oversubscription]
    """Whether a `tp_size` fits the machine."""
    remeasure: bool = False
    """Measure anew what another run kept: where flashhead_auto changes over."""

    @property
    def num_stages(self) -> int:
        """How often `Progress.stage` is called; each takes about as long."""
        return len(self.tp_sizes) * (2 + len(self.batch_sizes))


class Progress(Protocol):
    """Tells a person how far the sweep is."""

    def stage(self, text: str) -> None:
        """A stage begins; the one before it is done."""


@dataclass(kw_only=True)
class Sweep:
    """One rank's part of a sweep.

    control: all ranks of the run.
    host: a name that ranks share only on one host.
    provenance, write: used on rank 0; `write` gets each record as soon as it is known.
    records: all records so far on rank 0, empty elsewhere.
    costs: what exchanges cost, where a projection needs it and it could be timed.
    crossovers: by tp_size, where flashhead_auto was told to change over.
    notes: what else a reader of the records should know.
    """

    plan: Plan
    model: ModelSource
    workload: Workload
    control: Control
    host: str
    provenance: Callable[[], Provenance]
    write: Callable[[Record], None]
    progress: Progress
    records: list[Record] = field(default_factory=list)
    costs: dict[Operation, ExchangeCost] = field(default_factory=dict)
    crossovers: dict[int, Crossover] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def run(self, places: Mapping[int, TensorParallel | None]) -> list[Record]:
        """Measure the plan; every rank calls it.

        Args:
            places: this rank's place by `tp_size`, None outside the group; may hold sizes beyond
                the plan's, which serve to time exchanges.

        Raises:
            UserError: on every rank, if on one.
        """
        with self.control.phase():
            self._time_exchanges(places)
        for tp_size in sorted(self.plan.tp_sizes):
            with self.control.phase():
                place = places[tp_size]
                if place is not None:
                    self._measure_group(place)
        return self.records

    def _oversubscribed(self, tp_size: int) -> bool:
        return self.plan.fit(tp_size).oversubscribed

    def _time_exchanges(self, places: Mapping[int, TensorParallel | None]) -> None:
        """Learn what exchanges cost at the largest size that fits, where some size does not."""
        fitting = [size for size in places if size > 1 and not self._oversubscribed(size)]
        if not fitting or not any(self._oversubscribed(size) for size in self.plan.tp_sizes):
            return
        place = places[max(fitting)]
        if place is not None:
            group = self.control.among(range(max(fitting)), "exchange-costs")
            self.costs = time_exchange_costs(place, group)
        # The ranks outside that group project with them too.
        known = self.control.broadcast([[name, asdict(cost)] for name, cost in self.costs.items()])
        self.costs = {Operation(name): ExchangeCost(**cost) for name, cost in known}

    def _measure_group(self, place: TensorParallel) -> None:
        plan, workload, tp_size = self.plan, self.workload, place.tp_size
        group = self.control.among(range(tp_size), f"tp{tp_size}")
        states = workload.states.to(device=place.device, dtype=plan.dtype)
        self.progress.stage(f"tp {tp_size}: loading {', '.join(plan.heads)}")
        heads, peaks = self._load_heads(place, group, states[:1])
        self.progress.stage(f"tp {tp_size}: agreement with the dense head, {len(states)} states")
        facts = gather_facts(heads, peaks, workload, group, states)
        note = capture_note(list(heads.values()))
        if note is not None and note not in self.notes:
            self.notes.append(note)
        auto = heads.get(FlashHeadAuto.name)
        if isinstance(auto, FlashHeadAuto):
            self.crossovers[tp_size] = settle_crossover(
                auto,
                partial(batches_of, states),
                group,
                largest=max(plan.batch_sizes),
                in_turn=self._oversubscribed(tp_size),
                remeasure=plan.remeasure,
            )
        # What NCCL moves over NVLink, PCIe or shared memory, no network interface sees.
        counts = tp_size > 1 and place.device.type == "cpu"
        wire = WireCounter(group, self.host) if counts else None
        bandwidth = measure_bandwidth(place, group, in_turn=self._oversubscribed(tp_size))
        for batch_size in plan.batch_sizes:
            self.progress.stage(f"tp {tp_size}: batch {batch_size}")
            cells = measure_cell(
                heads,
                batches_of(states, batch_size),
                control=group,
                wire=wire,
                effort=plan.effort,
                oversubscribed=self._oversubscribed(tp_size),
                costs=self.costs,
            )
            with group.phase():
                if group.is_first:
                    self._record(facts, cells, bandwidth, tp_size, batch_size)
        heads.clear()
        release_memory(place.device)

    def _load_heads(
        self, place: TensorParallel, control: Control, one_state: Tensor
    ) -> tuple[dict[str, Head], dict[str, Peak]]:
        """Build the plan's heads on this rank, and measure what each needs to load and to run once.

        Each head gets weights of its own: shared ones would count in the first head's peak only,
        and be in the cache for the others.

        Raises:
            UserError: on every rank of the group, if a head cannot be built on one.
        """
        plan = self.plan
        _start_kernels(plan, one_state)
        heads: dict[str, Head] = {}
        peaks: dict[str, Peak] = {}
        for name in plan.heads:
            with control.phase():
                memory = PeakMemory(place.device)
                # faiss trains while it is built, and only once for a shard: no part of any timing.
                with compute_threads(plan.num_cores // place.tp_size):
                    heads[name] = build_head(
                        name,
                        tp=place,
                        model=self.model,
                        index_dir=self.workload.index_dir,
                        dtype=plan.dtype,
                        # For faiss_ivf the word means lists; its default reads as many bytes.
                        num_probes=plan.num_probes if needs_index(name) else None,
                        alpha=plan.alpha,
                        device=place.device,
                        escalation=plan.escalation,
                    )
            with control.phase():
                heads[name].forward(one_state)
                peaks[name] = memory.read()
        return heads, peaks

    def _record(
        self,
        facts: Mapping[str, HeadFacts],
        cells: Mapping[str, HeadCell],
        bandwidth: MemoryBandwidth,
        tp_size: int,
        batch_size: int,
    ) -> None:
        baseline_us = latency_us(cells[BASELINE])[0] if BASELINE in cells else None
        for name, cell in cells.items():
            one_rank_us = latency_us(cell)[0] if tp_size == 1 else self._median_us(name, batch_size)
            record = assemble_record(
                facts[name],
                cell,
                batch_size,
                self.plan.fit(tp_size),
                self.provenance(),
                bandwidth=bandwidth,
                one_rank_us=one_rank_us,
                baseline_us=baseline_us,
            )
            self.records.append(record)
            self.write(record)

    def _median_us(self, head: str, batch_size: int) -> float | None:
        """Latency on one rank, from an earlier record."""
        found = [
            r.median_us
            for r in self.records
            if (r.head, r.tp_size, r.batch_size) == (head, 1, batch_size)
        ]
        return found[0] if found else None


def batches_of(states: Tensor, batch_size: int) -> list[Tensor]:
    """Cut `states [N, D]` into up to `_NUM_BATCHES` batches `[B, D]`, starting over at the end.

    Iterations take them in turn, so that a retrieval head probes other clusters at every step.
    """
    num_batches = min(_NUM_BATCHES, max(1, len(states) // batch_size))
    # Strided over the states, so that a batch holds several sources as a server's does.
    rows = torch.arange(num_batches * batch_size, device=states.device)
    spread = (rows * max(1, len(states) // len(rows))) % len(states)
    return [states[spread[first::num_batches]] for first in range(num_batches)]


def _start_kernels(plan: Plan, one_state: Tensor) -> None:
    """Let this process load what compiled code needs, some 100 MB that are no head's own."""
    rows = one_state.new_zeros((64, one_state.shape[1]), dtype=plan.dtype)
    ops_for(one_state.device).dense_candidates(one_state, rows, 0)


def gather_facts(
    heads: Mapping[str, Head],
    peaks: Mapping[str, Peak],
    workload: Workload,
    control: Control,
    states: Tensor,
) -> dict[str, HeadFacts]:
    """Weights and peaks of every rank, and the agreement of each head on `states [N, D]`."""
    weights = control.gather({name: head.weight_bytes for name, head in heads.items()})
    all_peaks = control.gather({n: [peak.peak_bytes, peak.reason] for n, peak in peaks.items()})
    facts: dict[str, HeadFacts] = {}
    for name, head in heads.items():
        agreement: Agreement | None = None
        if workload.dense_ids is not None:
            agreement = top1_agreement(
                best_tokens(head, states), workload.dense_ids, workload.source_ids, workload.sources
            )
        reasons = [rank[name][1] for rank in all_peaks if rank[name][0] is None]
        facts[name] = HeadFacts(
            name=name,
            tp_size=head.tp.tp_size,
            weight_bytes_by_rank=tuple(rank[name] for rank in weights),
            peak_bytes_by_rank=tuple(rank[name][0] for rank in all_peaks),
            peak_reason=reasons[0] if reasons else None,
            agreement=agreement,
        )
    return facts


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
    one_rank_us: float | None,
    baseline_us: float | None,
) -> Record:
    """Make the record of one head in one cell.

    one_rank_us: latency of the same head at `tp_size` 1 and this batch size, where measured.
    baseline_us: latency of `dense_local_max` at this `tp_size` and batch size, where known.
    bandwidth: of the ranks' memory, measured as the cell's compute was.
    """
    median_us, projection = latency_us(cell)
    compute = cell.isolated or cell.wall
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
        scaling_efficiency=_ratio(one_rank_us, median_us, facts.tp_size),
    )


def latency_us(cell: HeadCell) -> tuple[float | None, str | None]:
    """The latency of a cell, and how it was projected; None for that where it was measured."""
    if cell.isolated is None:
        return cell.wall.median_us, None
    if cell.projected_communication_us is None:
        return None, (
            "none: the slowest rank's compute was measured alone, but no exchange could be timed, "
            "since not even two ranks fit this machine"
        )
    return cell.isolated.compute_us + cell.projected_communication_us, (
        "the slowest rank's compute measured alone, plus the ring model of exchanges with "
        "constants timed at the largest tp_size that fits this machine"
    )


def _each(total: float | None, senders: int) -> float | None:
    return None if total is None else total / senders


def _greatest(values: Sequence[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return max(known) if len(known) == len(values) else None


def _ratio(numerator: float | None, denominator: float | None, times: int = 1) -> float | None:
    if numerator is None or denominator is None or denominator <= 0:
        return None
    return numerator / (times * denominator)
