"""Terminal tables of the cost model: steps on systems that one may not have, and their figures.

Nothing here is measured, and every table says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich import box
from rich.table import Table

from flashhead_topology.cost import StepCost
from flashhead_topology.systems import Level, System

_PARTS = {
    "centroids": "head/centroids",
    "candidates": "head/candidates",
    "result": "head/result",
    "launches": "launches",
    "exchange": "head/exchange",
}
_BACK = {"back": "pipeline/send"}
_HOW = {"one_shot": "one shot", "collectives": "library", "none": "-"}


def cost_table(
    system: System, costs: Mapping[tuple[str, int], StepCost], batch_size: int, pp_size: int
) -> Table:
    """Seconds of a step by part for each (head, tp_size), in the order given; in microseconds."""
    stages = f", last of {pp_size} pipeline stages" if pp_size > 1 else ""
    title = f"{system.name}: PROJECTED by the cost model, batch {batch_size}{stages}"
    table = _table(title, f"{system.device}. {system.description}. docs/cost_model.md")
    shown = _PARTS | (_BACK if pp_size > 1 else {})
    table.add_column("head", no_wrap=True)
    for name in ["tp", "us a step", *shown, "MB read", "B sent", "MB held"]:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("sent by", no_wrap=True)
    for (head, tp_size), cost in costs.items():
        parts = [cost.parts.get(name, 0.0) for name in shown.values()]
        scans = " (scans)" if cost.scans else ""
        table.add_row(
            head + scans,
            str(tp_size),
            *(f"{seconds * 1e6:,.1f}" for seconds in (cost.total_s, *parts)),
            f"{cost.read_bytes / 1e6:,.1f}",
            f"{cost.sent_bytes:,.0f}",
            f"{cost.weight_bytes / 1e6:,.1f}" + ("" if cost.fits is not False else " TOO MUCH"),
            _HOW.get(cost.how, cost.how),
        )
    return table


def sources_table(system: System) -> Table:
    """Every figure of a system with where it comes from."""
    table = _table(f"{system.name}: figures", "Base units: seconds, bytes, operations a second.")
    table.add_column("of")
    table.add_column("figure")
    table.add_column("value", justify="right")
    table.add_column("kind")
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
    table.add_column("name")
    table.add_column("ranks", justify="right")
    table.add_column("what it is")
    for system in systems:
        table.add_row(system.name, f"1 to {system.max_ranks:,}", system.description)
    return table


def _table(title: str, caption: str) -> Table:
    # Narrow enough for a log: rich breaks off what does not fit.
    return Table(
        title=title, caption=caption, caption_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0)
    )
