"""Time of one collective from latency and bandwidth of the links that it crosses.

The model is Hockney's: a message of m bytes between two ranks takes `alpha + m * beta` (Hockney,
"The communication challenge for MPP", Parallel Computing 20, 1994). A collective is the steps of
its algorithm, and `base_s` of the outermost level that it crosses. Ranks fill the levels of a
system from the inside.

ring: P - 1 steps for an all-gather, 2 (P - 1) for an all-reduce; every rank sends (P - 1) / P of
    the buffer, or twice that (Patarasuk and Yuan, J. Parallel Distrib. Comput. 69, 2009). Delays
    add up along the hops, each of its own level, and the slowest link sets the bandwidth, as in
    NCCL's own tuning (nccl/src/graph/tuning.cc).
tree: all-reduce up and down a double binary tree over the groups of the outer levels and a chain
    within an innermost group; every rank sends the buffer twice at most (Sanders, Speck and Traeff,
    Parallel Computing 35, 2009).
gloo_ring: gloo's ring over TCP, followed message by message: see `gloo_ring`.
one_shot, an operation of its own: an all-reduce in which every rank writes its operand to all
    others directly and waits once, as through symmetric memory.

Letters: P ranks. Units: seconds and bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import log2
from typing import Literal, get_args

from flashhead_topology.gloo_ring import Hop, all_gather_phases, all_reduce_phases, ring_s
from flashhead_topology.systems import Level, levels_within

CollectiveOperation = Literal["all_reduce", "all_gather", "send_recv", "one_shot"]
OPERATIONS: tuple[CollectiveOperation, ...] = get_args(CollectiveOperation)

Algorithm = Literal["ring", "tree", "gloo_ring"]
ALGORITHMS: tuple[Algorithm, ...] = get_args(Algorithm)


def collective_time_s(
    operation: CollectiveOperation,
    payload_bytes: float,
    *,
    tp_size: int,
    levels: Sequence[Level],
    algorithm: str | None = None,
    element_bytes: int = 8,
) -> float:
    """Seconds of one collective over `tp_size` neighbouring ranks that enter it together.

    Args:
        payload_bytes: `size` as nccl-tests defines it: the reduced buffer of an all-reduce, the
            whole gathered buffer of an all-gather, the message of a send.
        levels: innermost first; those that the ranks do not cross are passed over.
        algorithm: of an all-reduce or all-gather; None for the quickest of ring and tree. A send
            and a one-shot exchange have none.
        element_bytes: of a reduced buffer, which `gloo_ring` never cuts within an element.

    Returns:
        0 where nothing is sent: one rank, or no bytes.

    Raises:
        ValueError: more ranks than the levels join, an operation or algorithm that is not known,
            a tree for an all-gather, or a one-shot exchange over a level that has none.
    """
    _check(operation, payload_bytes, tp_size, levels, algorithm)
    if tp_size == 1 or payload_bytes == 0:
        return 0.0
    crossed = levels_within(levels, tp_size)
    if operation == "one_shot":
        return _one_shot_s(payload_bytes, tp_size, crossed)
    outermost = crossed[-1]
    if operation == "send_recv":
        return outermost.base_s + outermost.alpha_s + payload_bytes * outermost.beta_s_per_byte
    if algorithm == "gloo_ring":
        hops = tuple(_hops(tp_size, crossed))
        steps_s = _gloo_ring_s(operation, round(payload_bytes), hops, element_bytes)
    elif algorithm == "ring" or operation == "all_gather":
        steps_s = _ring_s(operation, payload_bytes, tp_size, crossed)
    else:
        steps_s = _tree_s(payload_bytes, tp_size, crossed)
        if algorithm is None:
            steps_s = min(steps_s, _ring_s(operation, payload_bytes, tp_size, crossed))
    return outermost.base_s + steps_s


def _check(
    operation: str,
    payload_bytes: float,
    tp_size: int,
    levels: Sequence[Level],
    algorithm: str | None,
) -> None:
    if operation not in OPERATIONS:
        raise ValueError(f"operation {operation!r} is none of {', '.join(OPERATIONS)}")
    if algorithm is not None and algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm {algorithm!r} is none of {', '.join(ALGORITHMS)}")
    if operation == "all_gather" and algorithm == "tree":
        raise ValueError("a tree gathers nothing: choose ring for an all_gather")
    if not payload_bytes >= 0:
        raise ValueError(f"payload_bytes is {payload_bytes}: give 0 or more")
    joined = levels[-1].ranks if levels else 1
    if not 1 <= tp_size <= joined:
        raise ValueError(
            f"tp_size {tp_size} does not lie between 1 and the {joined} ranks that the levels join"
        )


def _ring_s(
    operation: CollectiveOperation, payload_bytes: float, tp_size: int, crossed: Sequence[Level]
) -> float:
    rounds = 2 if operation == "all_reduce" else 1
    # What one rank contributes passes all hops but one, and the last to arrive spares a quick one.
    hops = [hop.alpha_s for hop in _hops(tp_size, crossed)]
    delay_s = sum(hops) - min(hops)
    sent = (tp_size - 1) / tp_size * payload_bytes
    return rounds * (delay_s + sent * max(level.beta_s_per_byte for level in crossed))


def _tree_s(payload_bytes: float, tp_size: int, crossed: Sequence[Level]) -> float:
    """Up and down: a chain within an innermost group, binary trees above it."""
    joined = min(crossed[0].ranks, tp_size)
    depth_s = crossed[0].alpha_s * (joined - 1)
    for level in crossed[1:]:
        here = min(level.ranks, tp_size)
        depth_s += level.alpha_s * log2(here / joined)
        joined = here
    return 2 * (depth_s + payload_bytes * max(level.beta_s_per_byte for level in crossed))


def _one_shot_s(operand_bytes: float, tp_size: int, crossed: Sequence[Level]) -> float:
    """One wait, and what leaves by the busiest level's links; levels carry at the same time."""
    wait_s = busiest_s = 0.0
    joined = 1
    for level in crossed:
        if level.one_shot_alpha_s is None:
            raise ValueError(
                f"level {level.name} has no one_shot_alpha_s: ranks across it cannot write to each "
                f"other's memory"
            )
        here = min(level.ranks, tp_size)
        wait_s = max(wait_s, level.one_shot_alpha_s)
        busiest_s = max(busiest_s, (here - joined) * operand_bytes * level.beta_s_per_byte)
        joined = here
    return wait_s + busiest_s


def _hops(tp_size: int, crossed: Sequence[Level]) -> list[Hop]:
    """Each rank to the next around the ring, over the innermost level that joins both."""
    hops: list[Hop] = []
    for rank in range(tp_size):
        following = (rank + 1) % tp_size
        level = next(lv for lv in crossed if rank // lv.ranks == following // lv.ranks)
        hops.append(Hop(level.alpha_s, level.beta_s_per_byte, link=rank))
    return hops


@lru_cache(maxsize=4096)
def _gloo_ring_s(
    operation: CollectiveOperation, payload_bytes: int, hops: tuple[Hop, ...], element_bytes: int
) -> float:
    if operation == "all_gather":
        return ring_s(all_gather_phases(payload_bytes, len(hops)), hops)
    return ring_s(all_reduce_phases(payload_bytes, len(hops), element_bytes), hops)
