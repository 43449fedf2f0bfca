"""Runs against the first: what changed, whether beyond the noise, and the conditions of --fail-if.

A latency's noise is half the width from p10 to p90 over its median, of both runs together in
quadrature. Bytes and agreement do not scatter, since the algorithm sets them: any change of them is
marked. Counted bytes scatter as their bursts did. Projected latencies have no measured scatter and
are not compared.

Conditions of --fail-if:

    flashhead.top1_agreement<0.995
    flashhead.median_us@tp=1@batch=1>2500
    flashhead.change_median_us>0.10            a share of the first run; 0 within the noise

A figure is a number of the record. Latencies, speedups and efficiencies are measured ones; with
`projected_` in front they are projections. A condition that meets no figure is refused: it would
pass whatever happens.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pandas as pd

from flashhead_dist.bench.records import Record
from flashhead_dist.errors import UserError
from flashhead_dist.report.columns import COLUMNS
from flashhead_dist.report.figures import GREY, Chart, Section, head_legend, style_of
from flashhead_dist.report.runs import RunFolder
from flashhead_dist.report.tables import MARKED

LOWER_IS_BETTER = {
    "median_us": True,
    "counted_bytes_per_row": True,
    "sent_bytes_per_row": True,
    "weight_bytes_per_rank": True,
    "peak_bytes_per_rank": True,
    "top1_agreement": False,
    "top1_agreement_worst_source": False,
}
"""Figures that are compared, and which way is good."""
_ONCE_A_SIZE = (
    "weight_bytes_per_rank", "peak_bytes_per_rank", "top1_agreement", "top1_agreement_worst_source"
)  # fmt: skip
_CELL = ["head", "tp_size", "batch_size"]
_PEAK_NOISE, _PEAK_NOISE_BYTES = 0.05, 10e6
"""By how much a peak of resident memory moves between two runs of the same code."""
_PROVENANCE = (
    "system", "device", "os", "backend", "dtype", "threads_per_rank", "commit", "model",
    "model_hash", "index_hash", "num_probes", "alpha", "escalate_below", "seed"
)  # fmt: skip


def compare_all(runs: Sequence[RunFolder]) -> pd.DataFrame:
    """`compare_runs` of every later run with the first; empty for one run."""
    baseline, *others = runs
    found = [compare_runs(baseline, run) for run in others]
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame()


def compare_runs(baseline: RunFolder, run: RunFolder) -> pd.DataFrame:
    """All changes of cells that both runs have: a row a figure and cell.

    change, noise: shares of `before`. verdict: better, worse, within noise, or same.
    """
    cells = run.frame.merge(baseline.frame, on=_CELL, suffixes=("", "_before"))
    return pd.concat([_changes(cells, figure, run.letter) for figure in LOWER_IS_BETTER])


def _changes(cells: pd.DataFrame, figure: str, letter: str) -> pd.DataFrame:
    key = "measured_median_us" if figure == "median_us" else figure
    before, after = cells[f"{key}_before"], cells[key]
    change = after / before - 1
    noise = _noise(cells, figure)
    # On a logarithm a halving and a doubling are as far from each other's noise.
    with np.errstate(divide="ignore", invalid="ignore"):
        distance = np.where(after > 0, np.abs(np.log((after / before).astype(float))), change.abs())
    better = (change < 0) == LOWER_IS_BETTER[figure]
    frame = pd.DataFrame(
        {
            "run": letter,
            "figure": figure,
            **{name: cells[name] for name in _CELL},
            "before": before,
            "after": after,
            "change": change,
            "noise": noise,
            "verdict": np.select(
                [change == 0, distance <= np.log1p(noise), better],
                ["same", "within noise", "better"],
                "worse",
            ),
        }
    )
    frame = frame[before.notna() & after.notna() & (before != 0)]
    return frame.drop_duplicates(["head", "tp_size"]) if figure in _ONCE_A_SIZE else frame


def _noise(cells: pd.DataFrame, figure: str) -> Any:
    """Share by which iterations or bursts of two runs scatter."""

    def width(low: str, high: str, middle: str, end: str) -> pd.Series:
        found = (cells[high + end] - cells[low + end]) / cells[middle + end].replace(0, np.nan)
        return found.astype(float).fillna(0.0)

    if figure == "median_us":
        ends = ("p10_us", "p90_us", "median_us")
        return np.expm1(np.hypot(width(*ends, "") / 2, width(*ends, "_before") / 2))
    if figure == "counted_bytes_per_row":
        ends = (f"{figure}_least", f"{figure}_greatest", figure)
        return np.hypot(width(*ends, ""), width(*ends, "_before"))
    if figure == "peak_bytes_per_rank":
        return _PEAK_NOISE + _PEAK_NOISE_BYTES / cells[f"{figure}_before"].fillna(1.0)
    return pd.Series(0.0, cells.index)


def noise_bar(change: float, noise: float) -> tuple[float, float]:
    """The shares between which a change may lie, as far above as below it on a logarithm."""
    return (1 + change) / (1 + noise) - 1, (1 + change) * (1 + noise) - 1


def differences(baseline: RunFolder, run: RunFolder) -> list[str]:
    """What the runs differ in besides their figures, as `name: before → after`."""
    one, other = baseline.first, run.first
    pairs = [(name, getattr(one, name), getattr(other, name)) for name in _PROVENANCE]
    names = sorted({*one.versions, *other.versions})
    pairs += [(name, one.versions.get(name), other.versions.get(name)) for name in names]
    return [
        f"{name}: {_short(before)} → {_short(after)}"
        for name, before, after in pairs
        if before != after
    ]


def _short(value: object) -> str:
    text = str(value)
    return text[:12] + "…" if len(text) == 64 else text


def comparison_section(runs: Sequence[RunFolder], changes: pd.DataFrame) -> Section:
    """A chart a run and batch size of the latencies' change, and all changes as a frame."""
    baseline, *others = runs
    notes = [
        f"Change of a median from {baseline.letter}. Bars: noise, from p10 to p90 of both runs' "
        f"iterations. Filled: beyond the noise. Runs also differ by what the machine did meanwhile."
    ]
    for run in others:
        own = changes[changes["run"] == run.letter]
        what = "; ".join(differences(baseline, run)) or "nothing recorded: all change is noise"
        notes.append(f"{run.letter} differs from {baseline.letter} in {what}.")
        notes += [f"{run.letter}: {text}" for text in _counts(own)]
    title = "Comparison of runs"
    if changes.empty:
        missing = "the runs share no head at the same tp_size and batch size"
        return Section("comparison", title, tuple(notes), missing=missing)
    latencies = changes[changes["figure"] == "median_us"]
    columns = max(len(run.batch_sizes) for run in others)
    charts = [
        _comparison_chart(baseline, own, f"{letter}-b{size}", (index % columns + 1, columns))
        for letter, of_run in latencies.groupby("run")
        for index, (size, own) in enumerate(of_run.groupby("batch_size"))
    ]
    legend = head_legend(baseline.heads)
    legend += [("o", "beyond the noise"), ("hollow", "within the noise")]
    return Section("comparison", title, notes, changes, charts, columns, legend)


def _counts(changes: pd.DataFrame) -> list[str]:
    """How many figures changed beyond the noise, and how much all heads changed together."""
    texts = []
    is_latency = changes["figure"] == "median_us"
    for name, own in (
        ("step latencies", changes[is_latency]),
        ("figures of bytes, memory and agreement", changes[~is_latency]),
    ):
        if len(own):
            better, worse = ((own["verdict"] == verdict).sum() for verdict in MARKED)
            texts.append(
                f"of {len(own)} {name} that both runs have, {better} are better and {worse} are "
                f"worse beyond the noise."
            )
    latencies = changes[is_latency]
    if latencies["head"].nunique() >= 3:
        texts.append(
            f"over all {latencies['head'].nunique()} heads the median change of latency is "
            f"{100 * latencies['change'].median():+.1f} %; a change that all heads share is more "
            f"likely the machine's than the code's."
        )
    return texts


def _comparison_chart(
    baseline: RunFolder, changes: pd.DataFrame, key: str, cell: tuple[int, int]
) -> str:
    order = changes["head"].map(baseline.heads.index)
    own = changes.assign(order=order).sort_values(["tp_size", "order"])
    letter, batch_size = own["run"].iloc[0], own["batch_size"].iloc[0]
    title = f"{letter} against {baseline.letter}, batch {batch_size}"
    chart = Chart(f"comparison-{key}", title, cell, height_px=80 + 18 * len(own))
    rows = own.to_dict("records")
    bars = [noise_bar(row["change"], row["noise"]) for row in rows]
    for y, (row, (low, high)) in enumerate(zip(rows, bars, strict=True)):
        style = style_of(row["head"])
        face = {} if row["verdict"] in MARKED else {"markerfacecolor": "white"}
        chart.axes.hlines(y, 100 * low, 100 * high, color=style["color"], linewidth=1.0)
        text = (
            f"{row['head']}, tp {row['tp_size']}: {row['before']:,.0f} to {row['after']:,.0f} µs, "
            f"{100 * row['change']:+.1f} %, noise {100 * row['noise']:.1f} %: {row['verdict']}"
        )
        chart.point(100 * row["change"], y, text, **style | face)
    # One iteration in ten that took ten times as long makes a bar longer than the plot.
    lows, highs = zip(*bars, strict=True)
    most = max(0.1, 1.3 * own["change"].abs().max(), min(1.0, max(highs)))
    chart.axes.set_xlim(100 * max(min(lows), -most) - 2, 100 * most + 2)
    chart.axes.axvline(0, color=GREY, linewidth=0.8, zorder=1)
    chart.axes.set_yticks(range(len(rows)), [f"{row['head']}, tp {row['tp_size']}" for row in rows])
    chart.axes.set_ylim(len(rows) - 0.5, -0.5)
    chart.axes.grid(visible=True, axis="x")
    chart.axes.xaxis.set_major_formatter(lambda value, _: f"{value:+.0f} %")
    return chart.html()


_OPERATORS: dict[str, Callable[[pd.Series, float], pd.Series]] = {
    "<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt
}  # fmt: skip
_PATTERN = re.compile(
    r"\s*(?P<head>[a-z_0-9]+)\.(?P<figure>[a-z_0-9]+)(?P<cells>(?:@(?:tp|batch)=\d+)*)\s*"
    r"(?P<operator><=|>=|<|>)\s*(?P<limit>[-+0-9.eE]+)\s*"
)
_PROJECTED, _CHANGE = "projected_", "change_"
_FIGURES = sorted(
    field.name
    for field in fields(Record)
    if str(field.type) in ("float", "int", "float | None", "int | None")
    and field.name not in ("schema_version", "seed", "tp_size", "batch_size")
)
_BY_KIND = [name for name in _FIGURES if name in COLUMNS and COLUMNS[name].by_kind]


@dataclass(frozen=True)
class Condition:
    """One condition as it was given; sizes: the wanted `tp_size` and `batch_size`, if any."""

    text: str
    head: str
    figure: str
    sizes: dict[str, int]
    operator: str
    limit: float


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
    figure, names = found["figure"], {"tp": "tp_size", "batch": "batch_size"}
    known = [*_FIGURES, *(_PROJECTED + name for name in _BY_KIND)]
    known += [_CHANGE + name for name in LOWER_IS_BETTER]
    if figure not in known:
        raise UserError(
            f"--fail-if {text!r} names {figure}, which is no figure: choose from {', '.join(known)}"
        )
    cells = [cell.split("=") for cell in found["cells"].split("@")[1:]]
    sizes = {names[name]: int(value) for name, value in cells}
    return Condition(text.strip(), found["head"], figure, sizes, found["operator"], limit)


def check_conditions(
    conditions: Sequence[Condition], runs: Sequence[RunFolder], changes: pd.DataFrame
) -> list[str]:
    """A sentence for each condition that holds and each run that it holds in.

    changes: of the later runs against the first, for figures that start with `change_`.

    Raises:
        UserError: a condition meets no figure in any run.
    """
    failures = []
    for condition in conditions:
        found = {run.letter: _figures(condition, run, changes) for run in runs}
        if all(figures.empty for figures in found.values()):
            raise UserError(
                f"--fail-if {condition.text!r} meets no figure, so it could never fail: "
                f"{_why_none(condition, runs)}"
            )
        for letter, figures in found.items():
            failing = figures[_OPERATORS[condition.operator](figures["value"], condition.limit)]
            if failing.empty:
                continue
            furthest = failing.loc[[(failing["value"] - condition.limit).abs().idxmax()]].iloc[0]
            failures.append(
                f"--fail-if {condition.text!r} holds in run {letter}: {condition.head}."
                f"{condition.figure} is {furthest['value']:.6g} at tp {furthest['tp_size']:.0f}, "
                f"batch {furthest['batch_size']:.0f} (of {len(figures)} figures checked)"
            )
    return failures


def _figures(condition: Condition, run: RunFolder, changes: pd.DataFrame) -> pd.DataFrame:
    """`value` by `tp_size` and `batch_size`, of the cells that the condition is about."""
    figure = condition.figure
    if figure.startswith(_CHANGE):
        if changes.empty:
            return changes
        name = figure.removeprefix(_CHANGE)
        frame = changes[(changes["run"] == run.letter) & (changes["figure"] == name)]
        frame = frame.assign(value=frame["change"].where(frame["verdict"].isin(MARKED), 0.0))
    else:
        key = f"measured_{figure}" if figure in _BY_KIND else figure
        frame = run.frame.assign(value=run.frame[key].astype(float))
    frame = frame[(frame["head"] == condition.head) & frame["value"].notna()]
    for name, size in condition.sizes.items():
        frame = frame[frame[name] == size]
    return frame[["value", "tp_size", "batch_size"]].reset_index(drop=True)


def _why_none(condition: Condition, runs: Sequence[RunFolder]) -> str:
    heads = list(dict.fromkeys(head for run in runs for head in run.heads))
    if condition.head not in heads:
        return f"the heads measured are {', '.join(heads)}"
    if condition.figure.startswith(_CHANGE) and len(runs) < 2:
        return "a change needs two runs"
    return "no measured cell has it, so change the figure or the sizes"
