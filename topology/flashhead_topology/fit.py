"""Latency and bandwidth of a level, from measured times of collectives over it.

The times of `collective_cost` are linear in `(base_s, alpha_s, beta_s_per_byte)` as long as the
same messages are on the longest path, which changes only here and there. So the fit solves linear
least squares of relative residuals, follows the paths again, and stops once nothing moves; no
constant is below zero. Residuals are relative because times span five orders of magnitude:
absolute ones would fit the largest messages alone.

Units: seconds and bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from statistics import mean

import numpy as np
import numpy.typing as npt

from flashhead_topology.collective_cost import CollectiveOperation, collective_time_s
from flashhead_topology.systems import Level

_NAMES = ("base_s", "alpha_s", "beta_s_per_byte")
_MOST_ROUNDS = 20
_Array = npt.NDArray[np.float64]


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
