"""Time bare exchanges, to give `projection` its constants."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from flashhead_dist.bench.control import Control
from flashhead_dist.bench.projection import ExchangeCost, fit_exchange_cost
from flashhead_dist.bench.timing import HostClock, RankTimes, summarise
from flashhead_dist.parallel import Exchange, Operation, TensorParallel

_SMALL_BYTES = 8
_LARGE_BYTES = 1 << 20
_WARMUP = 10
_ITERATIONS = 60


def time_exchange_costs(place: TensorParallel, control: Control) -> dict[Operation, ExchangeCost]:
    """Time every operation at two sizes and fit its cost; every rank of the group calls it.

    Empty on CUDA. The model is of gloo's ring; there the keys of a small batch go through symmetric
    memory and more of them through a library, so that one line through both sizes would be that of
    neither, and the host's clock sees only launches.
    """
    if place.device.type == "cuda":
        return {}
    costs: dict[Operation, ExchangeCost] = {}
    for operation in Operation:
        dtype = torch.int64 if operation is Operation.MAX else torch.float32
        small, large = (
            (size, _median_us(place, control, operation, _operand(size, dtype, place)))
            for size in (_SMALL_BYTES, _LARGE_BYTES)
        )
        costs[operation] = fit_exchange_cost(operation, place.tp_size, small, large)
    return costs


def _operand(num_bytes: int, dtype: torch.dtype, place: TensorParallel) -> Tensor:
    return torch.zeros(num_bytes // dtype.itemsize, dtype=dtype, device=place.device)


def _median_us(
    place: TensorParallel, control: Control, operation: Operation, operand: Tensor
) -> float:
    """Median over iterations of the slowest rank's time."""
    clock = HostClock(place.barrier)
    work = partial(place.perform, Exchange(operation, operand))
    times_us = [clock.time_us(work) for _ in range(_WARMUP + _ITERATIONS)]
    ranks = control.gather(times_us[_WARMUP:])
    nothing = (0.0,) * _ITERATIONS
    return summarise([RankTimes(tuple(rank), nothing) for rank in ranks]).median_us
