"""`--fail-if`: conditions on figures of a run, for continuous integration.

    flashhead.top1_agreement<0.995
    flashhead.median_us@tp=1@batch=1>2500
    flashhead.change_median_us>0.10            a share, of the first run; only beyond the noise

A figure is a number of the record (docs/measuring.md). `median_us`, its p10 and p90,
`communication_us`, `speedup_over_dense_local_max` and `scaling_efficiency` are measured ones alone;
with `projected_` in front they are projections. A condition that meets no figure at all is the
user's mistake: it would pass whatever happens.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

from flashhead_dist.bench.records import Record
from flashhead_dist.errors import UserError
from flashhead_dist.report.comparison import LOWER_IS_BETTER, Change
from flashhead_dist.report.runs import Run

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
_PATTERN = re.compile(
    r"\s*(?P<head>[a-z_0-9]+)\.(?P<figure>[a-z_0-9]+)(?P<cells>(?:@(?:tp|batch)=\d+)*)\s*"
    r"(?P<operator><=|>=|<|>)\s*(?P<limit>[-+0-9.eE]+)\s*"
)
_OF_ONE_KIND = (
    "median_us",
    "p10_us",
    "p90_us",
    "communication_us",
    "speedup_over_dense_local_max",
    "scaling_efficiency",
)
_PROJECTED, _CHANGE = "projected_", "change_"
_FIGURES = sorted(
    field.name
    for field in fields(Record)
    if str(field.type) in ("float", "int", "float | None", "int | None")
    and field.name not in ("schema_version", "seed", "tp_size", "batch_size")
)


@dataclass(frozen=True)
class Condition:
    """One condition as it was given; tp_size and batch_size are None where all count."""

    text: str
    head: str
    figure: str
    tp_size: int | None
    batch_size: int | None
    operator: str
    limit: float


@dataclass(frozen=True)
class Failure:
    """A condition that holds, with the figure that went furthest and where."""

    condition: Condition
    run: str
    figure: float
    tp_size: int
    batch_size: int
    num_figures: int

    def __str__(self) -> str:
        return (
            f"--fail-if {self.condition.text!r} holds in run {self.run}: "
            f"{self.condition.head}.{self.condition.figure} is {self.figure:.6g} at tp "
            f"{self.tp_size}, batch {self.batch_size} (of {self.num_figures} figures checked)"
        )


def parse_condition(text: str) -> Condition:
    """Read one condition.

    Raises:
        UserError: it is no condition, or its figure is none of a record.
    """
    found = _PATTERN.fullmatch(text)
    if found is None:
        raise UserError(
            f"--fail-if {text!r} is no condition: write one as flashhead.top1_agreement<0.995, "
            f"with @tp=N or @batch=N after the figure for single sizes"
        )
    try:
        limit = float(found["limit"])
    except ValueError as error:
        raise UserError(
            f"--fail-if {text!r} compares with {found['limit']}, which is no number: give one"
        ) from error
    cells = dict(cell.split("=") for cell in found["cells"].split("@")[1:])
    _check_figure(text, found["figure"])
    return Condition(
        text=text.strip(),
        head=found["head"],
        figure=found["figure"],
        tp_size=int(cells["tp"]) if "tp" in cells else None,
        batch_size=int(cells["batch"]) if "batch" in cells else None,
        operator=found["operator"],
        limit=limit,
    )


def check_conditions(
    conditions: Sequence[Condition], runs: Sequence[Run], changes: Sequence[Change]
) -> list[Failure]:
    """The conditions that hold, in every run that they hold in.

    changes: of the later runs against the first, for figures that start with `change_`.

    Raises:
        UserError: a condition meets no figure in any run.
    """
    failures = []
    for condition in conditions:
        met = False
        for run in runs:
            figures = _figures(condition, run, changes)
            met = met or bool(figures)
            failing = [
                found
                for found in figures
                if _OPERATORS[condition.operator](found[0], condition.limit)
            ]
            if failing:
                furthest = max(failing, key=lambda found: abs(found[0] - condition.limit))
                failures.append(Failure(condition, run.letter, *furthest, len(figures)))
        if not met:
            raise UserError(
                f"--fail-if {condition.text!r} meets no figure, so it could never fail: "
                f"{_why_none(condition, runs)}"
            )
    return failures


def _figures(
    condition: Condition, run: Run, changes: Sequence[Change]
) -> list[tuple[float, int, int]]:
    """(figure, tp_size, batch_size) of the cells that the condition is about."""
    if condition.figure.startswith(_CHANGE):
        figure = condition.figure.removeprefix(_CHANGE)
        found = [
            # A change within the noise is none.
            (change.change if change.verdict in ("better", "worse") else 0.0, change)
            for change in changes
            if (change.run, change.head, change.figure) == (run.letter, condition.head, figure)
        ]
        cells = [(value, change.tp_size, change.batch_size) for value, change in found]
    else:
        cells = [
            (value, record.tp_size, record.batch_size)
            for record in run.records
            if record.head == condition.head
            and (value := _value(record, condition.figure)) is not None
        ]
    return [
        cell
        for cell in cells
        if condition.tp_size in (None, cell[1]) and condition.batch_size in (None, cell[2])
    ]


def _value(record: Record, figure: str) -> float | None:
    projected = figure.startswith(_PROJECTED)
    name = figure.removeprefix(_PROJECTED)
    if name in _OF_ONE_KIND and record.measured is projected:
        return None
    value = getattr(record, name)
    return None if value is None else float(value)


def _check_figure(text: str, figure: str) -> None:
    known = figure in _FIGURES
    if figure.startswith(_PROJECTED):
        known = figure.removeprefix(_PROJECTED) in _OF_ONE_KIND
    elif figure.startswith(_CHANGE):
        known = figure.removeprefix(_CHANGE) in LOWER_IS_BETTER
    if not known:
        changes = ", ".join(f"{_CHANGE}{name}" for name in LOWER_IS_BETTER)
        raise UserError(
            f"--fail-if {text!r} names {figure}, which is no figure: choose from "
            f"{', '.join(_FIGURES)}; {changes}"
        )


def _why_none(condition: Condition, runs: Sequence[Run]) -> str:
    heads = list(dict.fromkeys(head for run in runs for head in run.heads))
    if condition.head not in heads:
        return f"the heads measured are {', '.join(heads)}"
    if condition.figure.startswith(_CHANGE) and len(runs) < 2:
        return "a change needs two runs"
    return "no cell that was measured has it, so change the figure or the sizes"
