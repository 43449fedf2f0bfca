"""What exchanges would cost at a `tp_size` that this machine cannot run at full speed.

gloo's ring takes steps in turn: `2 (P - 1)` for an all-reduce, `P - 1` for an all-gather. The model
is `microseconds = steps * per_step + sent bytes * per_byte` per operation; its two constants come
from exchanges of two sizes timed in the same run at the largest `tp_size` that is not
oversubscribed. So it assumes ranks that are linked as those were, with a core each, and that a step
costs the same at any `tp_size`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from flashhead_dist.parallel import Operation, ring_sent_bytes


@dataclass(frozen=True)
class ExchangeCost:
    """Constants of one operation, and where they were measured."""

    us_per_step: float
    us_per_byte: float
    fitted_at_tp_size: int

    def microseconds(self, operation: Operation, operand_bytes: int, tp_size: int) -> float:
        """Cost of one exchange; 0 at `tp_size` 1, where there is none."""
        if tp_size == 1:
            return 0.0
        sent = ring_sent_bytes(operation, operand_bytes, tp_size)
        return ring_steps(operation, tp_size) * self.us_per_step + sent * self.us_per_byte


def ring_steps(operation: Operation, tp_size: int) -> int:
    """Steps of gloo's ring, one after the other."""
    return (tp_size - 1) * (1 if operation is Operation.GATHER else 2)


def fit_exchange_cost(
    operation: Operation, tp_size: int, small: tuple[int, float], large: tuple[int, float]
) -> ExchangeCost:
    """Fit the two constants to two timed exchanges `(operand bytes, microseconds)`.

    The small one fixes the cost of a step, the large one that of a byte; neither is below 0.

    Raises:
        ValueError: the exchanges are not of two sizes, or there is only one rank.
    """
    (small_bytes, small_us), (large_bytes, large_us) = small, large
    if tp_size < 2 or large_bytes <= small_bytes:
        raise ValueError("a fit needs two or more ranks and two sizes, the smaller one first")
    small_sent, large_sent = (
        ring_sent_bytes(operation, size, tp_size) for size in (small_bytes, large_bytes)
    )
    us_per_byte = max(0.0, (large_us - small_us) / (large_sent - small_sent))
    us_per_step = max(0.0, small_us - small_sent * us_per_byte) / ring_steps(operation, tp_size)
    return ExchangeCost(us_per_step, us_per_byte, tp_size)


def projected_communication_us(
    exchanges: Iterable[tuple[Operation, int]],
    tp_size: int,
    costs: Mapping[Operation, ExchangeCost],
) -> float:
    """Sum over one step's exchanges `(operation, operand bytes of a rank)`."""
    return sum(
        costs[operation].microseconds(operation, num_bytes, tp_size)
        for operation, num_bytes in exchanges
    )
