"""The sweep: heads over tensor-parallel sizes and batch sizes, one record each.

Groups are the first 1, 2, 4, ... ranks; the ranks outside a group sleep in the store until it is
done. All heads of a group are loaded together, so that their steps can be interleaved, and dropped
before the next group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from flashhead_dist.bench.assemble import (
    BASELINE,
    HeadFacts,
    assemble_record,
    find_median_us,
    latency_us,
)
from flashhead_dist.bench.bandwidth import MemoryBandwidth, measure_bandwidth
from flashhead_dist.bench.cell import HeadCell, measure_cell
from flashhead_dist.bench.control import Control
from flashhead_dist.bench.crossover import Crossover
from flashhead_dist.bench.exchange_timing import time_exchange_costs
from flashhead_dist.bench.graph import capture_note
from flashhead_dist.bench.kept_crossover import settle_crossover
from flashhead_dist.bench.loading import gather_facts, load_heads
from flashhead_dist.bench.memory import release_memory
from flashhead_dist.bench.plan import Inputs, Plan
from flashhead_dist.bench.projection import ExchangeCost
from flashhead_dist.bench.records import Provenance, Record
from flashhead_dist.bench.wire import WireCounter
from flashhead_dist.heads.flashhead_auto import FlashHeadAuto
from flashhead_dist.parallel import Operation, TensorParallel

_NUM_BATCHES = 16


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
    inputs: Inputs
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
        self.costs = _shared_costs(self.costs, self.control)

    def _measure_group(self, place: TensorParallel) -> None:
        plan, inputs, tp_size = self.plan, self.inputs, place.tp_size
        group = self.control.among(range(tp_size), f"tp{tp_size}")
        states = inputs.states.to(device=place.device, dtype=plan.dtype)
        self.progress.stage(f"tp {tp_size}: loading {', '.join(plan.heads)}")
        heads, peaks = load_heads(plan, inputs, place, group, states[:1])
        self.progress.stage(f"tp {tp_size}: agreement with the dense head, {len(states)} states")
        facts = gather_facts(heads, peaks, inputs, group, states)
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
            alone_us = find_median_us(self.records, name, 1, batch_size)
            record = assemble_record(
                facts[name],
                cell,
                batch_size,
                self.plan.fit(tp_size),
                self.provenance(),
                bandwidth=bandwidth,
                alone_us=latency_us(cell)[0] if tp_size == 1 else alone_us,
                baseline_us=baseline_us,
            )
            self.records.append(record)
            self.write(record)


def batches_of(states: Tensor, batch_size: int) -> list[Tensor]:
    """Cut `states [N, D]` into up to `_NUM_BATCHES` batches `[B, D]`, starting over at the end.

    Iterations take them in turn, so that a retrieval head probes other clusters at every step.
    """
    num_batches = min(_NUM_BATCHES, max(1, len(states) // batch_size))
    # Strided over the states, so that a batch holds several sources as a server's does.
    rows = torch.arange(num_batches * batch_size, device=states.device)
    spread = (rows * max(1, len(states) // len(rows))) % len(states)
    return [states[spread[first::num_batches]] for first in range(num_batches)]


def _shared_costs(
    costs: Mapping[Operation, ExchangeCost], control: Control
) -> dict[Operation, ExchangeCost]:
    known = control.broadcast(
        [
            [operation.value, cost.us_per_step, cost.us_per_byte, cost.fitted_at_tp_size]
            for operation, cost in costs.items()
        ]
    )
    return {
        Operation(name): ExchangeCost(us_per_step, us_per_byte, tp_size)
        for name, us_per_step, us_per_byte, tp_size in known
    }
