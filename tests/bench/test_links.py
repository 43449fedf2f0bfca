"""What exchanges cost: timed and fitted where the model holds, and projected from it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flashhead_dist.bench.control import Control
from flashhead_dist.bench.links import (
    ExchangeCost,
    fit_exchange_cost,
    projected_communication_us,
    ring_steps,
    time_exchange_costs,
)
from flashhead_dist.parallel import Operation, split_tensor_parallel


@pytest.mark.parametrize("operation", list(Operation))
def test_a_fit_gives_back_what_it_was_fitted_to(operation: Operation) -> None:
    cost = fit_exchange_cost(operation, 2, (8, 120.0), (1 << 20, 700.0))
    assert cost.microseconds(operation, 8, 2) == pytest.approx(120.0)
    assert cost.microseconds(operation, 1 << 20, 2) == pytest.approx(700.0)


def test_small_exchanges_grow_with_the_steps_of_the_ring() -> None:
    cost = ExchangeCost(us_per_step=60.0, us_per_byte=0.0, fitted_at_tp_size=2)
    assert cost.microseconds(Operation.MAX, 8, 2) == 120.0
    assert cost.microseconds(Operation.MAX, 8, 8) == 14 * 60.0
    assert cost.microseconds(Operation.GATHER, 8, 8) == 7 * 60.0


def test_large_exchanges_grow_with_the_bytes_a_rank_sends() -> None:
    cost = ExchangeCost(us_per_step=0.0, us_per_byte=0.001, fitted_at_tp_size=2)
    assert cost.microseconds(Operation.GATHER, 1000, 5) == pytest.approx(4.0)
    assert cost.microseconds(Operation.SUM, 1000, 5) == pytest.approx(1.6)


def test_one_rank_exchanges_nothing() -> None:
    cost = ExchangeCost(60.0, 1.0, 2)
    assert cost.microseconds(Operation.MAX, 8, 1) == 0.0
    assert ring_steps(Operation.MAX, 1) == 0


def test_constants_are_never_negative() -> None:
    cost = fit_exchange_cost(Operation.MAX, 2, (8, 500.0), (1 << 20, 400.0))
    assert cost.us_per_byte == 0.0
    assert cost.us_per_step == 250.0


def test_a_step_of_several_exchanges_is_their_sum() -> None:
    costs = {op: ExchangeCost(10.0, 0.0, 2) for op in Operation}
    exchanges = [(Operation.GATHER, 64), (Operation.MAX, 8)]
    assert projected_communication_us(exchanges, 4, costs) == 30.0 + 60.0
    assert projected_communication_us([], 4, costs) == 0.0


@pytest.mark.parametrize(("tp_size", "small", "large"), [(1, 8, 16), (2, 16, 16), (2, 16, 8)])
def test_a_fit_needs_two_sizes_and_two_ranks(tp_size: int, small: int, large: int) -> None:
    with pytest.raises(ValueError, match="two"):
        fit_exchange_cost(Operation.MAX, tp_size, (small, 1.0), (large, 2.0))


def _rank_times(rank: int, world_size: int) -> Any:
    place = split_tensor_parallel([world_size])[world_size]
    assert place is not None

    class Meeting(Control):
        def gather(self, value: Any) -> list[Any]:
            assert place is not None
            return place.gather_objects(value)

    control = Meeting(SimpleNamespace(), rank, list(range(world_size)))  # type: ignore[arg-type]
    return time_exchange_costs(place, control)


def test_gloo_is_fitted_for_every_operation(run_ranks: Callable[..., list[Any]]) -> None:
    first, second = run_ranks(_rank_times, 2)
    assert first == second
    assert set(first) == set(Operation)
    assert all(cost.us_per_step > 0 and cost.fitted_at_tp_size == 2 for cost in first.values())


def test_no_cost_is_fitted_on_cuda() -> None:
    """8 bytes of keys through symmetric memory and a megabyte through NCCL are not one line."""
    place = SimpleNamespace(device=torch.device("cuda"), tp_size=2)  # any call would raise
    assert time_exchange_costs(place, SimpleNamespace()) == {}  # type: ignore[arg-type]
