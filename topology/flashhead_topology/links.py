"""Time of one collective from latency and bandwidth of the links that it crosses, and the inverse.

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

`fit_level` finds the constants of a level from measured collectives. Times are linear in `(base_s,
alpha_s, beta_s_per_byte)` as long as the same messages are on the longest path, which changes only
at a few points. So it solves linear least squares of relative residuals, follows the paths again,
and stops once nothing moves; no constant is below zero. Residuals are relative because times span
five orders of magnitude: absolute ones would fit the largest messages alone.

Letters: P ranks. Units: seconds and bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import combinations
from math import log2
from statistics import mean
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from flashhead_topology.gloo_ring import Hop, all_gather_phases, all_reduce_phases, ring_s
from flashhead_topology.systems import Level, levels_within

CollectiveOperation = Literal["all_reduce", "all_gather", "send_recv", "one_shot"]
OPERATIONS: tuple[CollectiveOperation, ...] = get_args(CollectiveOperation)

Algorithm = Literal["ring", "tree", "gloo_ring"]
ALGORITHMS: tuple[Algorithm, ...] = get_args(Algorithm)

_NAMES = ("base_s", "alpha_s", "beta_s_per_byte")
_MOST_ROUNDS = 20
_Array = npt.NDArray[np.float64]


def payload_bytes(operation: str, operand_bytes: int, tp_size: int) -> int:
    """Size of an exchange, as nccl-tests defines `size`.

    The reduced buffer of an all-reduce; the gathered buffer, all ranks' parts, of an all-gather.
    No exchange takes place at `tp_size` 1.
    """
    if tp_size == 1:
        return 0
    return operand_bytes * (tp_size if operation == "all_gather" else 1)


def ring_sent_bytes(operation: str, operand_bytes: int, tp_size: int) -> float:
    """Bytes that each rank sends where the exchange is a ring, to compare with a counter.

    `2 (P - 1) / P` of the buffer for an all-reduce, `P - 1` operands for an all-gather.
    """
    if operation == "all_gather":
        return float(operand_bytes * (tp_size - 1))
    return 2 * operand_bytes * (tp_size - 1) / tp_size


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


@dataclass(frozen=True)
class Sample:
    """One measured collective: `payload_bytes` as `collective_time_s` takes them."""

    operation: CollectiveOperation
    payload_bytes: int
    tp_size: int
    seconds: float
    element_bytes: int = 8


@dataclass(frozen=True)
class Residual:
    """A sample beside what the fitted level says of it."""

    sample: Sample
    fitted_s: float

    @property
    def relative_error(self) -> float:
        """Signed: above 0 where the model says more than was measured."""
        return self.fitted_s / self.sample.seconds - 1


@dataclass(frozen=True)
class Fit:
    """A level without sources, and how well it says again what it was fitted to."""

    level: Level
    residuals: tuple[Residual, ...]

    def mean_relative_error(self, operation: CollectiveOperation | None = None) -> float:
        """Mean of the absolute relative errors, of one operation or of all samples.

        Raises:
            ValueError: no sample of that operation.
        """
        found = [
            abs(residual.relative_error)
            for residual in self.residuals
            if operation in (None, residual.sample.operation)
        ]
        if not found:
            raise ValueError(f"nothing was fitted to {operation}")
        return mean(found)


def fit_level(
    samples: Sequence[Sample], *, name: str, ranks: int, algorithm: str | None = None
) -> Fit:
    """Fit one level to collectives among ranks that it alone joins.

    Args:
        samples: two payloads or more; `one_shot` ones give `one_shot_alpha_s` and nothing else.
        name, ranks: of the level.
        algorithm: of all-reduces and all-gathers, as `collective_time_s` takes it.

    Raises:
        ValueError: fewer than two payloads, a single rank, or a time that is not above 0.
    """
    collective = [sample for sample in samples if sample.operation != "one_shot"]
    if len({sample.payload_bytes for sample in collective}) < 2:
        raise ValueError("latency and bandwidth take samples of two payloads or more")
    for sample in samples:
        if not sample.seconds > 0 or sample.tp_size < 2 or sample.payload_bytes < 1:
            raise ValueError(f"{sample} says nothing: give 2 ranks, 1 byte and a time above 0")
    joined = max(ranks, *(sample.tp_size for sample in samples))
    level = Level(name, joined, *_start(collective))
    for _ in range(_MOST_ROUNDS):
        following = _solve(collective, level, algorithm)
        settled = np.allclose(_constants(following), _constants(level), rtol=1e-6, atol=0)
        level = following
        if settled:
            break
    level = replace(level, ranks=ranks, one_shot_alpha_s=_one_shot_alpha_s(samples, level))
    wide = replace(level, ranks=joined)
    residuals = tuple(Residual(sample, predict_s(sample, wide, algorithm)) for sample in samples)
    return Fit(level, residuals)


def predict_s(sample: Sample, level: Level, algorithm: str | None) -> float:
    """What a level says of a sample's collective."""
    return collective_time_s(
        sample.operation,
        sample.payload_bytes,
        tp_size=sample.tp_size,
        levels=[level],
        algorithm=algorithm,
        element_bytes=sample.element_bytes,
    )


def _start(samples: Iterable[Sample]) -> tuple[float, float]:
    """Alpha and beta to begin with: the right order of magnitude finds the right paths."""
    quickest = min(samples, key=lambda sample: sample.seconds)
    largest = max(samples, key=lambda sample: sample.payload_bytes)
    return quickest.seconds, largest.seconds / largest.payload_bytes


def _constants(level: Level) -> _Array:
    return np.array([getattr(level, name) for name in _NAMES])


def _solve(samples: Sequence[Sample], level: Level, algorithm: str | None) -> Level:
    """The constants that fit best while the longest paths stay those of `level`."""
    predicted = np.array([predict_s(sample, level, algorithm) for sample in samples])
    columns = []
    for name in _NAMES:
        constant = getattr(level, name)
        # Large enough to be more than rounding, too small to change a path.
        step = 1e-4 * constant or 1e-9 * float(np.min(predicted))
        moved = _moved(level, name, constant + step)
        times = np.array([predict_s(sample, moved, algorithm) for sample in samples])
        columns.append((times - predicted) / step)
    measured = np.array([sample.seconds for sample in samples])
    relative = np.stack(columns, axis=1) / measured[:, None]
    base_s, alpha_s, beta_s_per_byte = _least_squares(relative)
    return replace(level, base_s=base_s, alpha_s=alpha_s, beta_s_per_byte=beta_s_per_byte)


def _moved(level: Level, name: str, value: float) -> Level:
    constants: dict[str, float] = {name: value}
    return replace(level, **constants)  # type: ignore[arg-type]


def _least_squares(matrix: _Array) -> list[float]:
    """The x of no negative entry for which `matrix [N, 3] @ x` is nearest to ones.

    With three unknowns every set of those above zero can be tried.
    """
    best, best_error = np.zeros(matrix.shape[1]), float("inf")
    for number in range(1, matrix.shape[1] + 1):
        for kept in map(list, combinations(range(matrix.shape[1]), number)):
            # Columns differ by nine orders of magnitude and more.
            scale = np.abs(matrix[:, kept]).max(axis=0)
            if not scale.all():
                continue
            found = np.linalg.lstsq(matrix[:, kept] / scale, np.ones(len(matrix)), rcond=None)[0]
            error = float(np.sum((matrix[:, kept] / scale @ found - 1) ** 2))
            if (found >= 0).all() and error < best_error:
                best, best_error = np.zeros(matrix.shape[1]), error
                best[kept] = found / scale
    return [float(value) for value in best]


def _one_shot_alpha_s(samples: Sequence[Sample], level: Level) -> float | None:
    """What one-shot exchanges take beyond their bytes, in the mean; None without any."""
    beyond = [
        sample.seconds - (sample.tp_size - 1) * sample.payload_bytes * level.beta_s_per_byte
        for sample in samples
        if sample.operation == "one_shot"
    ]
    return max(0.0, mean(beyond)) if beyond else None
