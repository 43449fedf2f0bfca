"""Time of one greedy step of an output head on a system: bytes, launches, collectives.

What a step reads, computes and sends is a `HeadWork`, which the head itself states. A part of the
local work takes the longer of two times, its bytes over the memory's bandwidth and its operations
over the peak rate (roofline: Williams, Waterman and Patterson, CACM 52, 2009). Each kernel adds
`launch_s`. Exchanges follow the local work: nothing overlaps. The rank that does most is modelled,
so no rank waits for another; in a pipeline, that is the head of the last stage, and a message takes
the tokens back to the first stage.

Not modelled: caches (weights are read from memory at every step), a step that waits for the host,
ranks that compete for memory, noise.

Units: seconds, bytes and floating-point operations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from flashhead_topology.links import (
    CollectiveOperation,
    collective_time_s,
    payload_bytes,
    ring_sent_bytes,
)
from flashhead_topology.machine import DeviceType
from flashhead_topology.systems import Level, System

_TOKEN_BYTES = 8
_MOST_KEYS_IN_ONE_SHOT = 256
"""Keys that the symmetric-memory exchange takes: `flashhead_kernels.keys`."""


@dataclass(frozen=True)
class Part:
    """One stretch of local work.

    read_bytes: of weights. scratch_bytes: of what it writes or reads beside them. gathered: whether
    the weights are read as scattered clusters.
    """

    read_bytes: float
    flops: float
    scratch_bytes: float = 0.0
    gathered: bool = False


@dataclass(frozen=True)
class Sent:
    """One exchange of `operand_bytes` of each rank.

    element_bytes: of one number in it. keys: packed candidates, which shared memory can carry.
    times: how often a step has it, on average.
    """

    operation: CollectiveOperation
    operand_bytes: int
    element_bytes: int
    keys: bool = False
    times: float = 1.0


@dataclass(frozen=True)
class HeadWork:
    """One rank's step.

    launches: kernels or operators on each type of device, exchanges aside. scan: the step as a scan
    of all rows, of a head that takes the cheaper of the two.
    """

    parts: Mapping[str, Part]
    exchanges: tuple[Sent, ...]
    launches: Mapping[DeviceType, int]
    weight_bytes: int
    scan: HeadWork | None = None

    @property
    def read_bytes(self) -> float:
        """Bytes of weights that the step reads."""
        return sum(part.read_bytes for part in self.parts.values())

    def payload_bytes(self, tp_size: int) -> float:
        """Payload of the step's exchanges on average, as nccl-tests' `size`; 0 at tp_size 1."""
        sent = (
            s.times * payload_bytes(s.operation, s.operand_bytes, tp_size) for s in self.exchanges
        )
        return sum(sent, 0.0)


@dataclass(frozen=True)
class StepCost:
    """The time of a step, by part.

    compute_s, exchange_s, total_s: total is their sum and, in a pipeline, the message back.
    read_bytes: of weights, on the rank that reads most. sent_bytes: by one rank of a ring.
    payload_bytes: as nccl-tests' `size`. weight_bytes: that the rank holds for the head. fits:
        whether its memory holds them; None where the system's memory is unknown.
    parts: seconds by range name (`head/centroids`, `head/candidates`, `head/result`,
        `head/exchange`, `pipeline/send`) and `launches`; they sum to total_s.
    how: what carries the exchange: `none`, `one_shot`, or `collectives`.
    scans: whether the work's `scan` is the cheaper way, and taken.
    """

    compute_s: float
    exchange_s: float
    total_s: float
    read_bytes: float
    sent_bytes: float
    payload_bytes: float
    weight_bytes: int
    fits: bool | None
    parts: Mapping[str, float]
    how: str
    scans: bool = False


def step_cost(
    work: HeadWork, system: System, *, tp_size: int, pp_size: int = 1, batch_size: int = 1
) -> StepCost:
    """Cost of one greedy step over `tp_size` neighbouring ranks of the last of `pp_size` stages.

    Raises:
        ValueError: pp_size below 1, more ranks than the system joins.
    """
    if pp_size < 1:
        raise ValueError(f"pp_size is {pp_size}: it must be at least 1")
    levels = system.levels_for(tp_size)
    outer = system.levels_for(tp_size * pp_size)
    back_s = 0.0
    if pp_size > 1:
        back_s = collective_time_s(
            "send_recv", _TOKEN_BYTES * batch_size, tp_size=tp_size * pp_size, levels=outer
        )
    parts = {name: _part_s(part, system) for name, part in work.parts.items()}
    parts["launches"] = work.launches[system.device_type] * system.launch_s
    compute_s = sum(parts.values())
    how = "none"
    exchange_s = sent_bytes = 0.0
    if tp_size > 1:
        for sent in work.exchanges:
            one_shot = _in_one_shot(sent, levels, batch_size)
            how = "one_shot" if one_shot else "collectives"
            exchange_s += sent.times * _exchange_s(sent, system, levels, tp_size, one_shot)
            sent_bytes += sent.times * ring_sent_bytes(sent.operation, sent.operand_bytes, tp_size)
    parts["head/exchange"] = exchange_s
    if back_s:
        parts["pipeline/send"] = back_s
    found = StepCost(
        compute_s=compute_s,
        exchange_s=exchange_s,
        total_s=compute_s + exchange_s + back_s,
        read_bytes=work.read_bytes,
        sent_bytes=sent_bytes,
        payload_bytes=work.payload_bytes(tp_size),
        weight_bytes=work.weight_bytes,
        fits=None if system.memory_bytes is None else work.weight_bytes <= system.memory_bytes,
        parts=parts,
        how=how,
    )
    if work.scan is None:
        return found
    sizes = {"tp_size": tp_size, "pp_size": pp_size, "batch_size": batch_size}
    scan = replace(step_cost(work.scan, system, **sizes), scans=True)
    return min(found, scan, key=lambda cost: cost.total_s)


def _part_s(part: Part, system: System) -> float:
    share = system.gather_share if part.gathered else system.memory_share
    bandwidth = system.memory_bandwidth_bytes_per_s
    memory_s = part.read_bytes / (bandwidth * share)
    memory_s += part.scratch_bytes / (bandwidth * system.memory_share)
    if system.peak_flop_per_s is None:
        return memory_s
    return max(memory_s, part.flops / system.peak_flop_per_s)


def _in_one_shot(sent: Sent, levels: tuple[Level, ...], batch_size: int) -> bool:
    """Whether packed keys go through memory that the ranks share."""
    mapped = all(level.one_shot_alpha_s is not None for level in levels)
    return sent.keys and mapped and batch_size <= _MOST_KEYS_IN_ONE_SHOT


def _exchange_s(
    sent: Sent, system: System, levels: tuple[Level, ...], tp_size: int, one_shot: bool
) -> float:
    # No tree gathers: a system whose all-reduces take one gathers in a ring.
    gathers_in_ring = sent.operation == "all_gather" and system.algorithm == "tree"
    return collective_time_s(
        "one_shot" if one_shot else sent.operation,
        payload_bytes(sent.operation, sent.operand_bytes, tp_size),
        tp_size=tp_size,
        levels=levels,
        algorithm=None if gathers_in_ring else system.algorithm,
        element_bytes=sent.element_bytes,
    )
