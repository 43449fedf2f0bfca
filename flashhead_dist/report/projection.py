"""Projections of a run's heads to other systems by the cost model, and tables of that model.

Nothing here is measured. A projection carries a band: what the model was off by where it was
compared with measurements (docs/guides/several-hosts.md), which were on other machines. The
exchange's error is shipped with the model (`flashhead_topology/validation.yaml`); that of compute
comes from the run itself where its system is described to the model, and else is unknown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.resources import files
from typing import Any

import pandas as pd
import yaml
from rich import box
from rich.table import Table

from flashhead_dist.bench.records import ENVIRONMENT_NAME
from flashhead_dist.errors import UserError
from flashhead_dist.heads.base import HeadShape
from flashhead_dist.heads.registry import BASELINE, DEFAULT_HEAD, HEADS, head_cost
from flashhead_dist.report.figures import (
    GREY,
    PROJECTED_GREY,
    Chart,
    Section,
    head_legend,
    log_numbers,
    size_axis,
    style_of,
)
from flashhead_dist.report.runs import RunFolder
from flashhead_topology.cost import StepCost
from flashhead_topology.systems import Level, System, SystemFileError, load_system

VALIDATION_NAME = "validation.yaml"
SMALL_BYTES = 4096
SHAPE_KEY = "head_shape"
_MOST_RANKS = 1024


@dataclass(frozen=True)
class ModelError:
    """Mean relative errors of the cost model; None where unknown. source: a sentence.

    small_exchange: of exchanges of less than `SMALL_BYTES`, where that is known.
    """

    compute: float | None
    exchange: float | None
    source: str
    small_exchange: float | None = None

    def band_s(self, cost: StepCost) -> tuple[float, float]:
        """Least and greatest seconds of a step, were both parts off by their mean error.

        A part whose error is unknown is taken as exact, as `source` says.
        """
        exchange = self.exchange
        if self.small_exchange is not None and cost.payload_bytes < SMALL_BYTES:
            exchange = self.small_exchange
        off_s = (self.compute or 0.0) * cost.compute_s + (exchange or 0.0) * cost.exchange_s
        return max(0.0, cost.total_s - off_s), cost.total_s + off_s


def open_system(name_or_path: str) -> System:
    """A shipped system or one of a file; raises UserError."""
    try:
        return load_system(name_or_path)
    except SystemFileError as error:
        raise UserError(f"--project {name_or_path}: {error}") from error


def head_shape(run: RunFolder) -> HeadShape:
    """The shape of the run's heads.

    Raises:
        UserError: `environment.json` does not hold it.
    """
    file = run.folder / ENVIRONMENT_NAME
    found: Any = run.environment.get(SHAPE_KEY)
    if not isinstance(found, Mapping):
        raise UserError(
            f"cannot project {run.folder}: {file} does not hold the head's shape ({SHAPE_KEY}), "
            f"so measure again"
        )
    known = {field.name for field in fields(HeadShape)}
    try:
        return HeadShape(**{name: value for name, value in found.items() if name in known})
    except (TypeError, ValueError) as error:
        raise UserError(f"{file} is damaged at {SHAPE_KEY} ({error}): measure again") from error


def compute_errors(run: RunFolder, shape: HeadShape, system: System) -> pd.Series:
    """Relative errors of modelled compute, on the system that the run was measured on.

    Of every measured cell that the model knows: modelled over measured, less one.
    """
    errors = []
    for record in run.records:
        if record.measured and record.head in HEADS:
            sizes = {"tp_size": record.tp_size, "batch_size": record.batch_size}
            try:
                cost = head_cost(record.head, shape, system, **sizes)
            except ValueError:
                continue
            errors.append(cost.compute_s / (record.compute_us * 1e-6) - 1)
    return pd.Series(errors, dtype=float)


def model_error(errors: pd.Series, measured_on: str | None) -> ModelError:
    """The error of projections: the shipped one of exchanges, and `errors` of compute.

    measured_on: the system that `errors` are of; None where there are none.

    Raises:
        UserError: the shipped file cannot be read.
    """
    shipped, source = _shipped_errors()
    small = shipped.pop("small", None)
    exchange = max(shipped.values(), default=None)
    text = f"Band: exchange by {_percent(exchange)} (the worst operation), "
    text += f"below {SMALL_BYTES:,} bytes by {_percent(small)}, " if small is not None else ""
    text += f"as validated on {source}; " if shipped else f"{source}; "
    compute = None if errors.empty else float(errors.abs().mean())
    if compute is None:
        text += "compute is taken as exact, since its error is unknown without --measured-on."
    else:
        text += f"compute by {_percent(compute)}, over {len(errors)} cells of this run on "
        text += f"{measured_on}."
    text += " Shipped systems agree with published all-reduces within a factor of two."
    return ModelError(compute, exchange, text, small)


def _percent(share: float | None) -> str:
    return "an unknown share" if share is None else f"{100 * share:.0f} %"


def _shipped_errors() -> tuple[dict[str, float], str]:
    """Mean relative error by operation, and what it was measured on."""
    file = files("flashhead_topology").joinpath(VALIDATION_NAME)
    if not file.is_file():
        return {}, f"{VALIDATION_NAME} is not shipped"
    try:
        document = yaml.safe_load(file.read_text(encoding="utf-8"))
        operations = document["operations"].items()
        errors = {name: float(found["mean_relative_error"]) for name, found in operations}
        source = str(document["source"])
    except (yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{VALIDATION_NAME} of flashhead_topology is damaged ({error!r}): install again"
        ) from error
    return errors, source


def project(
    run: RunFolder, names: Sequence[str], tp_sizes: Sequence[int] | None, measured_on: str | None
) -> Section:
    """The section of --project: systems by name or file; measured_on: that of the run, or None.

    Raises:
        UserError: see `open_system`, `head_shape` and `projection_section`.
    """
    systems = [open_system(name) for name in dict.fromkeys(names)]
    shape = head_shape(run)
    errors = pd.Series(dtype=float)
    if measured_on:
        errors = compute_errors(run, shape, open_system(measured_on))
    return projection_section(run, shape, systems, tp_sizes, model_error(errors, measured_on))


def default_sizes(system: System) -> list[int]:
    """Powers of two up to what the system joins."""
    most = min(system.max_ranks, _MOST_RANKS)
    return [2**i for i in range(most.bit_length()) if 2**i <= most]


def projection_section(
    run: RunFolder,
    shape: HeadShape,
    systems: Sequence[System],
    tp_sizes: Sequence[int] | None,
    error: ModelError,
) -> Section:
    """Every head of the run that the model knows on other systems: a chart a system and batch size.

    Raises:
        UserError: a size that a system does not join, or none of the heads is known.
    """
    heads = [head for head in run.heads if head in HEADS]
    if not heads:
        raise UserError(
            f"{run.folder} holds no head that the cost model knows ({', '.join(HEADS)}): "
            f"measure one of them"
        )
    rows: list[dict[str, Any]] = []
    left_out: set[str] = set()
    for system in systems:
        sizes = list(tp_sizes) if tp_sizes else default_sizes(system)
        for size in sizes:
            if not 1 <= size <= system.max_ranks:
                raise UserError(
                    f"--tp-sizes holds {size}, and {system.name} joins {system.max_ranks} ranks: "
                    f"give sizes from 1 to {system.max_ranks}"
                )
        for batch_size in run.batch_sizes:
            for head in heads:
                for size in sizes:
                    try:
                        cost = head_cost(head, shape, system, tp_size=size, batch_size=batch_size)
                    except ValueError as reason:
                        left_out.add(str(reason))
                        continue
                    cell = {"system": system.name, "batch_size": batch_size, "head": head}
                    rows.append(cell | {"tp_size": size} | _projected(cost, error))
    frame = pd.DataFrame(rows)
    cells = [cell for _, cell in frame.groupby(["system", "batch_size"], sort=False)]
    notes = [
        "PROJECTED by the cost model (docs/concepts/cost-model.md) from shapes of heads: no figure "
        "here was measured.",
        error.source,
        *(text for cell in cells for text in _sentences(cell)),
        *([f"Left out: {'; '.join(sorted(left_out))}."] if left_out else []),
    ]
    by_name = {system.name: system for system in systems}
    charts = [_chart(cell, by_name[cell["system"].iloc[0]], run.batch_sizes) for cell in cells]
    legend = [*head_legend(heads), ("hollow--", "PROJECTED")]
    title, columns = "Projection to other systems", len(run.batch_sizes)
    return Section("projection", title, notes, frame, charts, columns, legend)


def _projected(cost: StepCost, error: ModelError) -> dict[str, Any]:
    low_s, high_s = error.band_s(cost)
    return {
        "projected_step_us": cost.total_s * 1e6,
        "projected_low_us": low_s * 1e6,
        "projected_high_us": high_s * 1e6,
        "projected_compute_us": cost.compute_s * 1e6,
        "projected_exchange_us": cost.exchange_s * 1e6,
        "projected_read_bytes": cost.read_bytes,
        "projected_sent_bytes": cost.sent_bytes,
        "projected_weight_bytes_per_rank": cost.weight_bytes,
        "carried_by": cost.how,
    }


def _sentences(cell: pd.DataFrame) -> list[str]:
    """Where the step of the product and of the dense head is shortest on a system."""
    texts = []
    for head in (DEFAULT_HEAD, BASELINE):
        own = cell[cell["head"] == head]
        if own.empty:
            continue
        first = own.sort_values("tp_size").iloc[0]
        best = own.sort_values(["projected_step_us", "tp_size"]).iloc[0]
        text = (
            f"{first['system']}, batch {first['batch_size']}: {head} is PROJECTED to take "
            f"{_us(first['projected_step_us'])} at tp {first['tp_size']}"
        )
        if best["tp_size"] == first["tp_size"]:
            text += " and to gain nothing from more ranks, because the exchange costs more"
        else:
            text += (
                f" and is fastest at tp {best['tp_size']}: {_us(best['projected_step_us'])}, "
                f"{_us(best['projected_exchange_us'])} of it for the exchange"
            )
        texts.append(f"{text}.")
    return texts


def _chart(cell: pd.DataFrame, system: System, batch_sizes: Sequence[int]) -> str:
    batch_size = cell["batch_size"].iloc[0]
    name = "".join(c if c.isalnum() else "-" for c in system.name)
    key, title = f"projection-{name}-b{batch_size}", f"PROJECTED: {system.name}, batch {batch_size}"
    chart = Chart(key, title, (list(batch_sizes).index(batch_size) + 1, len(batch_sizes)))
    axes = chart.axes
    axes.set_facecolor(PROJECTED_GREY)
    for head, own in cell.groupby("head", sort=False):
        style = style_of(str(head)) | {"markerfacecolor": "white", "markersize": 5.0}
        sizes, us = own["tp_size"], own["projected_step_us"]
        band = own["projected_low_us"], own["projected_high_us"]
        axes.fill_between(sizes, *band, color=style["color"], alpha=0.18, linewidth=0)
        axes.plot(sizes, us, color=style["color"], linestyle="--", linewidth=1.0)
        for size, value in zip(sizes, us, strict=True):
            chart.point(size, value, f"{head}, tp {size}: {_us(value)} (PROJECTED)", **style)
    drawn = sorted(cell["tp_size"].unique())
    for level in system.levels[:-1]:
        if drawn[0] < level.ranks < drawn[-1]:
            axes.axvline(level.ranks * 2**0.5, color=GREY, linewidth=0.7, linestyle=":")
            axes.annotate(
                level.name, (level.ranks * 2**0.42, 0.985), xycoords=axes.get_xaxis_transform(),
                ha="right", va="top", fontsize=7, color="#555555",
            )  # fmt: skip
    log_numbers(axes)
    size_axis(axes, drawn)
    axes.set_xlabel("tp_size (ranks)")
    axes.set_ylabel("µs a step, PROJECTED")
    return chart.html()


def _us(us: float) -> str:
    return f"{us:,.0f} µs" if us >= 100 else f"{us:.1f} µs"


_PARTS = {
    "centroids": "head/centroids",
    "candidates": "head/candidates",
    "result": "head/result",
    "launches": "launches",
    "exchange": "head/exchange",
}
_CARRIERS = {"one_shot": "one shot", "collectives": "library", "none": "-"}


def cost_table(
    system: System, costs: Mapping[tuple[str, int], StepCost], batch_size: int, pp_size: int
) -> Table:
    """Microseconds of a step by part for each (head, tp_size), in the order given."""
    stages = f", last of {pp_size} pipeline stages" if pp_size > 1 else ""
    title = f"{system.name}: PROJECTED by the cost model, batch {batch_size}{stages}"
    table = _table(title, f"{system.device}. {system.description}. docs/concepts/cost-model.md")
    parts = _PARTS | ({"back": "pipeline/send"} if pp_size > 1 else {})
    table.add_column("head", no_wrap=True)
    for name in ["tp", "us a step", *parts, "MB read", "B sent", "MB held"]:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("sent by", no_wrap=True)
    for (head, tp_size), cost in costs.items():
        seconds = [cost.total_s, *(cost.parts.get(name, 0.0) for name in parts.values())]
        table.add_row(
            head + (" (scans)" if cost.scans else ""),
            str(tp_size),
            *(f"{part_s * 1e6:,.1f}" for part_s in seconds),
            f"{cost.read_bytes / 1e6:,.1f}",
            f"{cost.sent_bytes:,.0f}",
            f"{cost.weight_bytes / 1e6:,.1f}" + ("" if cost.fits is not False else " TOO MUCH"),
            _CARRIERS.get(cost.how, cost.how),
        )
    return table


def sources_table(system: System) -> Table:
    """Every figure of a system with where it comes from."""
    table = _table(f"{system.name}: figures", "Base units: seconds, bytes, operations a second.")
    for name in ("of", "figure", "value", "kind"):
        table.add_column(name, justify="right" if name == "value" else "left")
    table.add_column("source", overflow="fold")
    holders: list[System | Level] = [system, *system.levels]
    for holder in holders:
        name = f"{holder.name}, {holder.ranks} ranks" if isinstance(holder, Level) else "device"
        for figure, source in holder.sources.items():
            error = source.relative_error
            off = "" if error is None else f"\nmean relative error {100 * error:.1f} %"
            note = f"\n{source.note}" if source.note else ""
            value = f"{getattr(holder, figure):.4g}"
            table.add_row(name, figure, value, source.kind, f"{source.source}{note}{off}")
            name = ""
    return table


def systems_table(systems: Sequence[System]) -> Table:
    """Names and descriptions of systems."""
    table = _table("Shipped systems", "Give one to --system, or the path of a .yaml file.")
    for name in ("name", "ranks", "what it is"):
        table.add_column(name, justify="right" if name == "ranks" else "left")
    for system in systems:
        table.add_row(system.name, f"1 to {system.max_ranks:,}", system.description)
    return table


def _table(title: str, caption: str) -> Table:
    # Narrow enough for a log: rich breaks off what does not fit.
    return Table(
        title=title, caption=caption, caption_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0)
    )
