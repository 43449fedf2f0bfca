"""Predicted beside measured communication, pure: errors by kind of message, and crossovers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import exp, log
from statistics import mean

LEAST_BYTES = 4096
"""The model is held to its error above this payload; below it software is most of the time."""

GATHER, KEYS = "dense_gather", "flashhead"


@dataclass(frozen=True)
class Cell:
    """One head at one batch size over one network; seconds of one step's communication.

    calibrated_hosts: on how many hosts of the same link the model's constants were measured.
    """

    network: str
    num_hosts: int
    calibrated_hosts: int
    head: str
    batch_size: int
    payload_bytes: int
    measured_s: float
    predicted_s: float

    @property
    def relative_error(self) -> float:
        """Signed: above 0 where the model says more than was measured."""
        return self.predicted_s / self.measured_s - 1

    @property
    def kind(self) -> str:
        """What it validates: an operation above `LEAST_BYTES`, or `small` messages."""
        if self.payload_bytes <= LEAST_BYTES:
            return "small"
        return "all_gather" if self.head == GATHER else "all_reduce"


def calibrated_alike(cells: Sequence[Cell]) -> list[Cell]:
    """Those whose constants are from as many hosts as they run on."""
    return [cell for cell in cells if cell.calibrated_hosts == cell.num_hosts]


def calibrated_on(cells: Sequence[Cell], num_hosts: int) -> list[Cell]:
    """Those whose constants are from `num_hosts` hosts, whatever they run on."""
    return [cell for cell in cells if cell.calibrated_hosts == num_hosts]


def mean_error(cells: Sequence[Cell]) -> float:
    """Mean of the absolute relative errors.

    Raises:
        ValueError: no cell.
    """
    if not cells:
        raise ValueError("there is no cell to compare")
    return mean(abs(cell.relative_error) for cell in cells)


def by_kind(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """Cells by `kind`, those that there are."""
    kinds = ("all_reduce", "all_gather", "small")
    found = {kind: [cell for cell in cells if cell.kind == kind] for kind in kinds}
    return {kind: mine for kind, mine in found.items() if mine}


def crossover(gather_s: Mapping[int, float], keys_s: Mapping[int, float]) -> float | None:
    """Batch size from which on gathering logits takes longer than exchanging keys.

    Between two measured sizes it is interpolated, both axes logarithmic. None where gathering is
    slower, or quicker, at every size: then the sizes do not hold it.
    """
    sizes = sorted(gather_s.keys() & keys_s.keys())
    ahead = {size: log(gather_s[size] / keys_s[size]) for size in sizes}
    turns = [(a, b) for a, b in pairwise(sizes) if ahead[a] <= 0 < ahead[b]]
    if not turns:
        return None
    a, b = turns[-1]
    share = -ahead[a] / (ahead[b] - ahead[a])
    return exp(log(a) + share * (log(b) - log(a)))


def crossovers(cells: Sequence[Cell]) -> tuple[float | None, float | None]:
    """The measured and the predicted crossover of one network's cells."""

    def turn(seconds: Callable[[Cell], float]) -> float | None:
        times = {
            head: {cell.batch_size: seconds(cell) for cell in cells if cell.head == head}
            for head in (GATHER, KEYS)
        }
        return crossover(times[GATHER], times[KEYS])

    return turn(lambda cell: cell.measured_s), turn(lambda cell: cell.predicted_s)
