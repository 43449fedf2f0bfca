"""The heads of a run on another system and other rank counts, by the cost model.

Nothing here is measured. A projection carries a band: what the model was off by where it could be
held against measurements (docs/network.md), which is on other machines than the one projected to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from flashhead_dist.bench.records import ENVIRONMENT_NAME
from flashhead_dist.errors import UserError
from flashhead_dist.heads.base import HeadShape
from flashhead_dist.heads.registry import HEADS, head_cost
from flashhead_dist.report.model_error import ModelError
from flashhead_dist.report.runs import Run
from flashhead_topology.cost import StepCost
from flashhead_topology.systems import System, SystemFileError, load_system

SHAPE_KEY = "head_shape"
_MOST_RANKS = 1024


@dataclass(frozen=True)
class Outlook:
    """One head on one system at one batch size, by `tp_size` ascending.

    bands: (least, greatest) seconds of a step, by `tp_size`. left_out: why sizes are missing.
    """

    system: System
    head: str
    batch_size: int
    costs: Mapping[int, StepCost]
    bands: Mapping[int, tuple[float, float]]
    left_out: str | None

    @property
    def best_size(self) -> int:
        """The size with the shortest step, the smallest of equal ones: more ranks gain nothing."""
        return min(self.costs, key=lambda size: (self.costs[size].total_s, size))


def open_system(name_or_path: str) -> System:
    """A shipped system or one of a file; raises UserError."""
    try:
        return load_system(name_or_path)
    except SystemFileError as error:
        raise UserError(f"--project {name_or_path}: {error}") from error


def head_shape(run: Run) -> HeadShape:
    """The shape of the run's heads.

    Raises:
        UserError: `environment.json` does not tell it.
    """
    file = run.folder / ENVIRONMENT_NAME
    found: Any = run.environment.get(SHAPE_KEY)
    if not isinstance(found, Mapping):
        raise UserError(
            f"cannot project {run.folder}: {file} does not tell the head's shape ({SHAPE_KEY}), "
            f"so measure again"
        )
    known = {field.name for field in fields(HeadShape)}
    try:
        return HeadShape(**{name: value for name, value in found.items() if name in known})
    except (TypeError, ValueError) as error:
        raise UserError(f"{file} is damaged at {SHAPE_KEY} ({error}): measure again") from error


def default_sizes(system: System) -> list[int]:
    """Powers of two up to what the system joins."""
    most = min(system.max_ranks, _MOST_RANKS)
    return [2**i for i in range(most.bit_length()) if 2**i <= most]


def outlooks(
    run: Run,
    shape: HeadShape,
    system: System,
    tp_sizes: Sequence[int] | None,
    error: ModelError,
) -> list[Outlook]:
    """Every head of the run that the model knows, at every batch size of the run.

    Raises:
        UserError: a size that the system does not join, or none of the heads is known.
    """
    sizes = list(tp_sizes) if tp_sizes else default_sizes(system)
    for size in sizes:
        if not 1 <= size <= system.max_ranks:
            raise UserError(
                f"--tp-sizes holds {size}, and {system.name} joins {system.max_ranks} ranks: give "
                f"sizes from 1 to {system.max_ranks}"
            )
    heads = [head for head in run.heads if head in HEADS]
    if not heads:
        raise UserError(
            f"{run.folder} holds no head that the cost model knows ({', '.join(HEADS)}): "
            f"measure one of them"
        )
    return [
        _outlook(head, shape, system, sizes, batch_size, error)
        for batch_size in run.batch_sizes
        for head in heads
    ]


def _outlook(
    head: str,
    shape: HeadShape,
    system: System,
    sizes: Sequence[int],
    batch_size: int,
    error: ModelError,
) -> Outlook:
    costs: dict[int, StepCost] = {}
    left_out: str | None = None
    for size in sizes:
        try:
            costs[size] = head_cost(head, shape, system, tp_size=size, batch_size=batch_size)
        except ValueError as reason:
            left_out = str(reason)
    bands = {size: error.band_s(cost) for size, cost in costs.items()}
    return Outlook(system, head, batch_size, costs, bands, left_out)
