"""A calibration for people: a table of its points, a CSV file, and a picture of points and fit."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

from flashhead_dist.bench.links import Point
from flashhead_dist.bench.records import cannot_write
from flashhead_dist.errors import UserError
from flashhead_topology.links import Fit

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLORS = {
    "all_reduce": ("#D55E00", "D"),
    "all_gather": ("#0072B2", "s"),
    "send_recv": ("#009E73", "o"),
    "one_shot": ("#CC79A7", "^"),
}
COLUMNS = (
    "level", "operation", "payload_bytes", "tp_size", "p10_us", "median_us", "p90_us",
    "num_iterations", "fitted_us", "relative_error",
)  # fmt: skip


@dataclass(frozen=True)
class LevelPoints:
    """One level's points in the order in which its fit has their residuals."""

    points: Sequence[Point]
    fit: Fit

    def rows(self) -> list[Mapping[str, object]]:
        """One mapping a point, by `COLUMNS`."""
        return [
            {
                "level": self.fit.level.name,
                "operation": point.operation,
                "payload_bytes": point.payload_bytes,
                "tp_size": point.tp_size,
                "p10_us": point.p10_s * 1e6,
                "median_us": point.median_s * 1e6,
                "p90_us": point.p90_s * 1e6,
                "num_iterations": point.num_iterations,
                "fitted_us": residual.fitted_s * 1e6,
                "relative_error": residual.relative_error,
            }
            for point, residual in zip(self.points, self.fit.residuals, strict=True)
        ]


def calibration_table(levels: Sequence[LevelPoints], quantile: str) -> Table:
    """Every point beside the fit; quantile: what was fitted, `p10` or `median`."""
    table = Table(title=f"Collectives by level, fitted to the {quantile}", box=box.SIMPLE)
    for name in ("level", "operation"):
        table.add_column(name)
    for name in ("ranks", "bytes", "p10 us", "median us", "p90 us", "fitted us", "error %"):
        table.add_column(name, justify="right")
    for level in levels:
        for row in level.rows():
            table.add_row(
                str(row["level"]),
                str(row["operation"]),
                str(row["tp_size"]),
                f"{row['payload_bytes']:,}",
                *(f"{row[key]:,.1f}" for key in ("p10_us", "median_us", "p90_us", "fitted_us")),
                f"{100 * float(str(row['relative_error'])):+.1f}",
            )
        table.add_section()
    return table


def write_points(levels: Sequence[LevelPoints], path: Path) -> None:
    """Write all points as CSV.

    Raises:
        UserError: the file system refuses.
    """
    try:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            for level in levels:
                writer.writerows(level.rows())
    except OSError as error:
        raise cannot_write(path, error) from error


def draw_points(levels: Sequence[LevelPoints], path: Path, quantile: str) -> None:
    """Draw measured points and fitted lines, a panel a level, both axes logarithmic.

    Raises:
        UserError: matplotlib is missing, or the file system refuses.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(
            "plots need matplotlib, which is not installed: run pip install 'flashhead-dist"
            "[report]', or pass --skip-plots"
        ) from error
    figure = Figure(figsize=(5.2 * len(levels), 4.4), layout="constrained")
    panels = figure.subplots(1, len(levels), squeeze=False)[0]
    for axes, level in zip(panels, levels, strict=True):
        _draw_level(axes, level, quantile)
    panels[0].set_ylabel("microseconds, slowest rank")
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise cannot_write(path, error) from error


def _draw_level(axes: Axes, level: LevelPoints, quantile: str) -> None:
    rows = level.rows()
    for operation in dict.fromkeys(row["operation"] for row in rows):
        for tp_size in dict.fromkeys(row["tp_size"] for row in rows):
            mine = [
                row for row in rows if (row["operation"], row["tp_size"]) == (operation, tp_size)
            ]
            if not mine:
                continue
            color, marker = _COLORS[str(operation)]
            sizes = [float(str(row["payload_bytes"])) for row in mine]
            measured = [float(str(row[f"{quantile}_us"])) for row in mine]
            fitted = [float(str(row["fitted_us"])) for row in mine]
            label = f"{operation}, {tp_size} ranks"
            hollow = "white" if tp_size != rows[0]["tp_size"] else color
            axes.plot(
                sizes, measured, linestyle="none", marker=marker, color=color,
                markerfacecolor=hollow, label=label,
            )  # fmt: skip
            axes.plot(sizes, fitted, color=color, linewidth=1.0)
    link = level.fit.level
    rate = f"{1e-9 / link.beta_s_per_byte:.3g} GB/s" if link.beta_s_per_byte else "no limit"
    axes.set_title(
        f"{link.name}: alpha {link.alpha_s * 1e6:.1f} us, {rate}, base {link.base_s * 1e6:.1f} us\n"
        f"points: {quantile} measured; lines: fitted, mean error "
        f"{100 * level.fit.mean_relative_error():.0f} %",
        fontsize=9,
    )
    axes.set_xscale("log", base=8)
    ticks = sorted({point.payload_bytes for point in level.points})
    axes.set_xticks(ticks, [_short_bytes(tick) for tick in ticks], fontsize=8)
    axes.xaxis.minorticks_off()
    axes.set_yscale("log")
    axes.set_xlabel("bytes (size as nccl-tests defines it)")
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize=8, frameon=False)


def _short_bytes(number: int) -> str:
    """`8`, `32K`, `64M`: binary, as the sizes are."""
    for unit, size in (("M", 1 << 20), ("K", 1 << 10)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)
