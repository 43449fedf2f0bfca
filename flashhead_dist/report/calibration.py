"""A calibration for people: a table of its points, a CSV file, and a picture of points and fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
from rich.table import Table

from flashhead_dist.bench.links import Point
from flashhead_dist.bench.records import cannot_write
from flashhead_dist.report.figures import require_matplotlib
from flashhead_dist.report.tables import rich_table
from flashhead_topology.links import Fit

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_STYLES = {
    "all_reduce": ("#D55E00", "D"),
    "all_gather": ("#0072B2", "s"),
    "send_recv": ("#009E73", "o"),
    "one_shot": ("#CC79A7", "^"),
}
_IN_TABLE = [
    "level", "operation", "tp_size", "payload_bytes", "p10_us", "median_us", "p90_us", "fitted_us",
    "relative_error"
]  # fmt: skip


@dataclass(frozen=True)
class LevelPoints:
    """One level's points in the order in which its fit has their residuals."""

    points: Sequence[Point]
    fit: Fit

    def rows(self) -> list[Mapping[str, object]]:
        """One mapping a point."""
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


def _frame(levels: Sequence[LevelPoints]) -> pd.DataFrame:
    return pd.DataFrame([row for level in levels for row in level.rows()])


def calibration_table(levels: Sequence[LevelPoints], quantile: str) -> Table:
    """Every point beside the fit; quantile: what was fitted, `p10` or `median`."""
    title = f"Collectives by level, fitted to the {quantile}"
    return rich_table(title, _frame(levels)[_IN_TABLE])


def write_points(levels: Sequence[LevelPoints], path: Path) -> None:
    """Write all points as CSV; raises UserError where the file system refuses."""
    try:
        _frame(levels).to_csv(path, index=False)
    except OSError as error:
        raise cannot_write(path, error) from error


def draw_points(levels: Sequence[LevelPoints], path: Path, quantile: str) -> None:
    """Draw measured points and fitted lines, a panel a level, both axes logarithmic.

    Raises:
        UserError: matplotlib is missing, or the file system refuses.
    """
    require_matplotlib("run pip install -e '.[report]', or pass --skip-plots")
    from matplotlib.figure import Figure

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
    frame = _frame([level])
    first_size = frame["tp_size"].iloc[0]
    for (operation, tp_size), own in frame.groupby(["operation", "tp_size"], sort=False):
        color, marker = _STYLES[str(operation)]
        axes.plot(
            own["payload_bytes"], own[f"{quantile}_us"], marker, color=color,
            markerfacecolor=color if tp_size == first_size else "white",
            label=f"{operation}, {tp_size} ranks"
        )  # fmt: skip
        axes.plot(own["payload_bytes"], own["fitted_us"], color=color, linewidth=1.0)
    link = level.fit.level
    rate = f"{1e-9 / link.beta_s_per_byte:.3g} GB/s" if link.beta_s_per_byte else "no limit"
    axes.set_title(
        f"{link.name}: alpha {link.alpha_s * 1e6:.1f} us, {rate}, base {link.base_s * 1e6:.1f} us\n"
        f"points: {quantile} measured; lines: fitted, mean error "
        f"{100 * level.fit.mean_relative_error():.0f} %",
        fontsize=9,
    )
    axes.set_xscale("log", base=8)
    ticks = sorted(frame["payload_bytes"].unique())
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
