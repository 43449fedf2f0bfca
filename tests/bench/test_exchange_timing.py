"""What exchanges cost is fitted where the model holds, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from flashhead_dist.bench.control import Control
from flashhead_dist.bench.links import time_exchange_costs
from flashhead_dist.parallel import Operation, split_tensor_parallel


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
