"""How far the cost model was off where measurements could be held against it: a projection's band.

The exchange's error is shipped with the model (`flashhead_topology/validation.yaml`, from runs over
shaped networks). That of compute comes from the run itself, where the system that it was measured
on is described to the model; else it is not known, and the band says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from statistics import mean

import yaml

from flashhead_dist.errors import UserError
from flashhead_dist.heads.base import HeadShape
from flashhead_dist.heads.registry import HEADS, head_cost
from flashhead_dist.report.runs import Run
from flashhead_topology.cost import StepCost
from flashhead_topology.systems import System

VALIDATION_NAME = "validation.yaml"
SMALL_BYTES = 4096
_SMALL = "small"


@dataclass(frozen=True)
class ModelError:
    """Mean relative errors; None where not known. words: a sentence on where they come from.

    small_exchange: of exchanges of less than `SMALL_BYTES`, where that is known apart.
    """

    compute: float | None
    exchange: float | None
    words: str
    small_exchange: float | None = None

    def band_s(self, cost: StepCost) -> tuple[float, float]:
        """Least and greatest seconds of a step, were both parts off by their mean error.

        A part whose error is not known is taken as exact, as `words` says.
        """
        exchange = self.exchange
        if self.small_exchange is not None and cost.payload_bytes < SMALL_BYTES:
            exchange = self.small_exchange
        off_s = (self.compute or 0.0) * cost.compute_s + (exchange or 0.0) * cost.exchange_s
        return max(0.0, cost.total_s - off_s), cost.total_s + off_s


@dataclass(frozen=True)
class Check:
    """The model against one measured cell, seconds."""

    head: str
    tp_size: int
    batch_size: int
    measured_compute_s: float
    modelled_compute_s: float
    measured_exchange_s: float | None
    modelled_exchange_s: float

    @property
    def compute_error(self) -> float:
        """Relative, of the measured."""
        return self.modelled_compute_s / self.measured_compute_s - 1


def check_model(run: Run, shape: HeadShape, system: System) -> list[Check]:
    """Every measured cell of the run that the model can tell, on the system that it ran on."""
    checks = []
    for record in run.records:
        if not record.measured or record.head not in HEADS:
            continue
        try:
            cost = head_cost(
                record.head, shape, system, tp_size=record.tp_size, batch_size=record.batch_size
            )
        except ValueError:
            continue
        exchange = record.split.step_us["exchange"]
        checks.append(
            Check(
                head=record.head,
                tp_size=record.tp_size,
                batch_size=record.batch_size,
                measured_compute_s=record.compute_us * 1e-6,
                modelled_compute_s=cost.compute_s,
                measured_exchange_s=None if exchange is None else exchange.median * 1e-6,
                modelled_exchange_s=cost.exchange_s,
            )
        )
    return checks


def mean_compute_error(checks: Sequence[Check]) -> float | None:
    """Mean of the relative errors' sizes; None without a check."""
    return mean(abs(check.compute_error) for check in checks) if checks else None


def model_error(checks: Sequence[Check], checked_on: str | None) -> ModelError:
    """The band of projections: shipped errors of exchanges, and `checks` of compute.

    checked_on: the system that `checks` are of; None where there are none.

    Raises:
        UserError: the shipped file cannot be read.
    """
    exchange, small_exchange, exchange_words = _shipped_exchange_error()
    compute = mean_compute_error(checks)
    if compute is None or checked_on is None:
        compute_words = (
            "Its error of compute is not known and is not in the band: give --measured-on SYSTEM "
            "to hold the model against this run"
        )
    else:
        compute_words = (
            f"compute by {100 * compute:.0f} %, its mean error over {len(checks)} cells of this "
            f"run on {checked_on}"
        )
    joined = (
        f"{exchange_words}. {compute_words}"
        if compute is None
        else (f"{exchange_words}, and {compute_words}")
    )
    words = (
        f"Band: {joined}. A system other than these may be further off: the links of the shipped "
        f"ones agree with published all-reduces within a factor of two (docs/cost_model.md)."
    )
    return ModelError(compute, exchange, words, small_exchange)


def _shipped_exchange_error() -> tuple[float | None, float | None, str]:
    """The greatest error over operations, that of small payloads, and where both are from."""
    file = files("flashhead_topology").joinpath(VALIDATION_NAME)
    if not file.is_file():
        words = f"the exchange's error is missing, because {VALIDATION_NAME} is not shipped"
        return None, None, words
    try:
        document = yaml.safe_load(file.read_text(encoding="utf-8"))
        errors = {
            name: float(found["mean_relative_error"])
            for name, found in document["operations"].items()
        }
        source = str(document["source"])
    except (yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{VALIDATION_NAME} of flashhead_topology is damaged ({error!r}): install again"
        ) from error
    small = errors.pop(_SMALL, None)
    if not errors:
        raise UserError(
            f"{VALIDATION_NAME} of flashhead_topology names no operation: install again"
        )
    worst = max(errors, key=lambda name: errors[name])
    words = f"exchange by {100 * errors[worst]:.0f} %, the greatest mean relative error ({worst})"
    if small is not None:
        words += f", below {SMALL_BYTES:,} bytes by {100 * small:.0f} %,"
    return errors[worst], small, f"{words} where the model was validated ({source})"
