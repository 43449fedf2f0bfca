"""The picture of a tuning run: agreement that bytes buy, overall and in the worst source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashhead_dist.errors import UserError
from flashhead_dist.tune.front import curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FRONT_NAME = "front.png"
_LEAST_MISS = 2e-5
"""A share of misses below this is drawn here: none of the states was missed."""
_COLOURS = {"overall": "#1f5fa8", "worst source": "#c1440e"}


@dataclass(frozen=True)
class Mark:
    """A point beside the front: what is named, its share of bytes, and both agreements."""

    label: str
    bytes_share: float
    top1: float
    top1_worst: float


def write_front(
    records: Sequence[dict[str, Any]],
    runnable: Sequence[dict[str, Any]],
    path: Path,
    *,
    title: str,
    marks: Sequence[Mark] = (),
    chosen: dict[str, Any] | None = None,
    held_out: bool = False,
) -> Path:
    """Draw shares of misses against shares of bytes, both as powers of ten, and return `path`.

    records: every measured point; runnable: those that a real head runs, drawn solid. held_out:
        draw the front of the held-out states, as it is seen afterwards: the chosen point was
        chosen without them.

    Raises:
        UserError: matplotlib is missing, or the file cannot be written.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(
            "the picture needs matplotlib, which is not installed: run pip install "
            "'flashhead-dist[report]', or pass --skip-plots"
        ) from error
    with mpl.rc_context({"font.size": 9}):
        figure = Figure(figsize=(7.2, 4.6), layout="constrained")
        axes = figure.add_subplot()
        prefix = "held_out_" if held_out else ""
        for name, key in (("overall", "top1"), ("worst source", "top1_worst")):
            colour = _COLOURS[name]
            _steps(axes, records, prefix + key, colour, "--", f"{name}, simulated")
            _steps(axes, runnable, prefix + key, colour, "-", f"{name}, the head as it is")
            for mark, marker in zip(marks, "sDv^P", strict=False):
                share = mark.top1 if key == "top1" else mark.top1_worst
                axes.plot(
                    100 * mark.bytes_share, _miss(share), marker, color=colour, mfc="white", ms=7
                )
            if chosen is not None:
                axes.plot(
                    100 * chosen["bytes_share"], _miss(chosen[prefix + key]), "*", color=colour,
                    ms=12, label=f"{name}, chosen",
                )  # fmt: skip
        for mark, marker in zip(marks, "sDv^P", strict=False):
            axes.plot([], [], marker, color="#444444", mfc="white", ms=7, label=mark.label)
        _frame(axes, title)
        try:
            figure.savefig(path, dpi=150)
        except OSError as error:
            raise UserError(
                f"{path} cannot be written ({error.strerror}): give another --out"
            ) from error
    return path


def _steps(
    axes: Axes,
    records: Sequence[dict[str, Any]],
    key: str,
    colour: str,
    style: str,
    label: str,
) -> None:
    steps = curve(records, key)
    if not steps:
        return
    axes.plot(
        [100 * record["bytes_share"] for record in steps],
        [_miss(record[key]) for record in steps],
        style, marker="." if style == "-" else None, color=colour, lw=1.3, label=label,
    )  # fmt: skip


def _miss(share: float) -> float:
    return 100 * max(1 - share, _LEAST_MISS)


def _frame(axes: Axes, title: str) -> None:
    from matplotlib.ticker import FuncFormatter

    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.invert_yaxis()
    axes.set_xlabel("bytes read a token, % of the dense head's (bf16)")
    axes.set_ylabel("states whose dense argmax is found, %")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(FuncFormatter(_some_minor))
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: "all" if value <= 100 * _LEAST_MISS else f"{100 - value:g}")
    )
    axes.grid(which="both", alpha=0.25, lw=0.5)
    axes.set_title(title, fontsize=9, loc="left")
    # Few points lie where few bytes find all.
    axes.legend(fontsize=7.5, loc="upper left", framealpha=0.9)


def _some_minor(value: float, _: object) -> str:
    leading = round(value / 10 ** len(str(int(value))[1:]), 6)
    return f"{value:g}" if leading in (2, 3, 5) else ""
