"""Time of one greedy step of a head on a system: bytes, launches, collectives.

A part of the local work takes the longer of two times, its bytes over the memory's bandwidth and
its operations over the peak rate (roofline: Williams, Waterman and Patterson, CACM 52, 2009). Each
kernel adds `launch_s`. Exchanges come after it: nothing overlaps. The rank that does most is
modelled, so nobody waits for another; of a pipeline, the head of its last stage and the message
that takes the tokens back to the first.

Not modelled: caches (weights are read from memory at every step), a step that waits for the host,
ranks that compete for memory, noise.

Units: seconds and bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from flashhead_topology.collective_cost import collective_time_s
from flashhead_topology.head_shape import HeadShape, HeadWork, Part, Sent
from flashhead_topology.head_work import HEAD_NAMES, head_work, scan_work
from flashhead_topology.systems import Level, System

__all__ = ["HEAD_NAMES", "HeadShape", "StepCost", "step_cost"]

_TOKEN_BYTES = 8
_MOST_KEYS_IN_ONE_SHOT = 256
"""Keys that the symmetric-memory exchange takes: `flashhead_kernels.exchange_layout`."""


@dataclass(frozen=True)
class StepCost:
    """What a step takes, and of what.

    compute_s, exchange_s, total_s: total is their sum and, in a pipeline, the message back.
    read_bytes: of weights, on the rank that reads most. sent_bytes: by one rank of a ring, as
    `collectives.ring_sent_bytes`. payload_bytes: as nccl-tests' `size`.
    weight_bytes: that the rank holds for the head. fits: whether its memory holds them; None where
    the system does not say how much it has.
    parts: seconds by range name (`head/centroids`, `head/candidates`, `head/result`,
        `head/exchange`, `pipeline/send`) and `launches`; they sum to total_s.
    how: what carries the exchange: `none`, `one_shot`, or `collectives`.
    scans: whether `flashhead_auto` scans its rows.
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
    head_name: str,
    shape: HeadShape,
    system: System,
    *,
    tp_size: int,
    pp_size: int = 1,
    batch_size: int = 1,
) -> StepCost:
    """Cost of one greedy step over `tp_size` neighbouring ranks of the last of `pp_size` stages.

    `flashhead_auto` takes the cheaper of its two ways.

    Raises:
        ValueError: an unknown head, a size below 1, more ranks than the head can be split over or
            the system joins, a retrieval head and no index.
    """
    if pp_size < 1:
        raise ValueError(f"pp_size is {pp_size}: it must be at least 1")
    work = head_work(head_name, shape, tp_size, batch_size)
    levels = system.levels_for(tp_size)
    outer = system.levels_for(tp_size * pp_size)
    back_s = 0.0
    if pp_size > 1:
        back_s = collective_time_s(
            "send_recv", _TOKEN_BYTES * batch_size, tp_size=tp_size * pp_size, levels=outer
        )
    found = _cost(work, system, levels, tp_size, batch_size, back_s, scans=False)
    if head_name == "flashhead_auto":
        scan = scan_work(shape, tp_size, batch_size)
        other = _cost(scan, system, levels, tp_size, batch_size, back_s, scans=True)
        found = min(found, other, key=lambda cost: cost.total_s)
    return found


def _cost(
    work: HeadWork,
    system: System,
    levels: tuple[Level, ...],
    tp_size: int,
    batch_size: int,
    back_s: float,
    *,
    scans: bool,
) -> StepCost:
    parts = {name: _part_s(part, system) for name, part in work.parts.items()}
    parts["launches"] = work.launches[system.device_type] * system.launch_s
    compute_s = sum(parts.values())
    how = "none"
    exchange_s = sent = payload = 0.0
    if tp_size > 1:
        for exchange in work.exchanges:
            one_shot = _in_one_shot(exchange, levels, batch_size)
            how = "one_shot" if one_shot else "collectives"
            once_s = _exchange_s(exchange, system, levels, tp_size, one_shot=one_shot)
            exchange_s += exchange.times * once_s
            sent += exchange.times * _ring_sent_bytes(exchange, tp_size)
            payload += exchange.times * _payload_bytes(exchange, tp_size)
    parts["head/exchange"] = exchange_s
    if back_s:
        parts["pipeline/send"] = back_s
    return StepCost(
        compute_s=compute_s,
        exchange_s=exchange_s,
        total_s=compute_s + exchange_s + back_s,
        read_bytes=work.read_bytes,
        sent_bytes=sent,
        payload_bytes=payload,
        weight_bytes=work.weight_bytes,
        fits=None if system.memory_bytes is None else work.weight_bytes <= system.memory_bytes,
        parts=parts,
        how=how,
        scans=scans,
    )


def _part_s(part: Part, system: System) -> float:
    share = system.gather_share if part.gathered else system.memory_share
    bandwidth = system.memory_bandwidth_bytes_per_s
    memory_s = part.read_bytes / (bandwidth * share)
    memory_s += part.scratch_bytes / (bandwidth * system.memory_share)
    if system.peak_flop_per_s is None:
        return memory_s
    return max(memory_s, part.flops / system.peak_flop_per_s)


def _in_one_shot(exchange: Sent, levels: tuple[Level, ...], batch_size: int) -> bool:
    """Whether packed keys go through memory that the ranks share."""
    mapped = all(level.one_shot_alpha_s is not None for level in levels)
    return exchange.keys and mapped and batch_size <= _MOST_KEYS_IN_ONE_SHOT


def _exchange_s(
    exchange: Sent, system: System, levels: tuple[Level, ...], tp_size: int, *, one_shot: bool
) -> float:
    # No tree gathers: a system whose all-reduces take one gathers in a ring.
    gathers_in_ring = exchange.operation == "all_gather" and system.algorithm == "tree"
    return collective_time_s(
        "one_shot" if one_shot else exchange.operation,
        _payload_bytes(exchange, tp_size),
        tp_size=tp_size,
        levels=levels,
        algorithm=None if gathers_in_ring else system.algorithm,
        element_bytes=exchange.element_bytes,
    )


def _payload_bytes(exchange: Sent, tp_size: int) -> int:
    return exchange.operand_bytes * (tp_size if exchange.operation == "all_gather" else 1)


def _ring_sent_bytes(exchange: Sent, tp_size: int) -> float:
    if exchange.operation == "all_gather":
        return float(exchange.operand_bytes * (tp_size - 1))
    return 2 * exchange.operand_bytes * (tp_size - 1) / tp_size
