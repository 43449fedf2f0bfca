"""Pictures and files of a run's folder: latency and bytes, a tuning's front.

A measured point is filled and its line solid; a projected one is hollow, its line dashed and its
sizes on grey. Bytes: the count is filled, the analytic figure a ring around or below it.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from flashhead_dist.bench.records import Record, cannot_write
from flashhead_dist.errors import UserError
from flashhead_dist.heads.registry import BASELINE
from flashhead_dist.report.figures import (
    draw_bytes,
    draw_heads,
    draw_ideal,
    log_numbers,
    require_matplotlib,
    style_of,
)
from flashhead_dist.report.runs import records_frame, write_summary
from flashhead_dist.tune.front import curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LATENCY_NAME = "latency.png"
BYTES_NAME = "bytes.png"
FRONT_NAME = "front.png"
_MAX_COLUMNS = 4
_LEAST_MISS = 2e-5
"""A share of misses below this is drawn here: none of the states was missed."""
_FRONT_COLORS = {"overall": "#1f5fa8", "worst source": "#c1440e"}


def write_report(records: Sequence[Record], folder: Path, *, plots: bool) -> list[Path]:
    """Write the summary and, if `plots`, the pictures of a run; return their paths.

    Raises:
        UserError: the folder cannot be written, or matplotlib is missing.
    """
    paths = [write_summary(records, folder)]
    return paths + (write_plots(records, folder) if plots else [])


def write_plots(records: Sequence[Record], folder: Path) -> list[Path]:
    """Draw the pictures that the records allow; bytes only where some rank count sends any.

    Raises:
        UserError: matplotlib is missing, or the folder cannot be written.
    """
    require_matplotlib("run pip install -e '.[report]', or pass --skip-plots")
    pictures = {LATENCY_NAME: latency_figure(records)}
    if any(record.sent_bytes_per_row > 0 for record in records):
        pictures[BYTES_NAME] = bytes_figure(records)
    for name, figure in pictures.items():
        try:
            figure.savefig(folder / name, dpi=150)
        except OSError as error:
            raise cannot_write(folder / name, error) from error
    return [folder / name for name in pictures]


def latency_figure(records: Sequence[Record]) -> Figure:
    """Latency of a step against `tp_size`, logarithmic both, with bars from p10 to p90."""
    frame, heads = records_frame(records), _heads(records)

    def draw(axes: Axes, batch: pd.DataFrame) -> None:
        draw_ideal(axes, batch, BASELINE)
        draw_heads(axes, batch, "median_us", heads, low="p10_us", high="p90_us")
        log_numbers(axes)

    notes = ["Bars: p10 to p90 over iterations."]
    kinds = [_key("measured", marker="o", linestyle="-")]
    if over := _oversubscribed(records):
        notes.append(f"{over}: PROJECTED from isolated compute and a model of communication.")
        kinds.append(_key("PROJECTED", marker="o", linestyle="--", markerfacecolor="white"))
    if frame["median_us"].isna().any():
        notes.append("Left out: sizes whose communication is unknown.")
    if len(frame[(frame["head"] == BASELINE) & (frame["tp_size"] == 1)]["median_us"].dropna()):
        kinds.append(_key(f"ideal: {BASELINE}\nat tp 1, over tp", linestyle=":", color="#777777"))
    labels = "Latency of the output head", "microseconds a step: slowest rank, median"
    return _figure(records, labels, draw, kinds, notes)


def bytes_figure(records: Sequence[Record]) -> Figure:
    """Bytes that a rank sends for one row: counted (filled) and analytic (ring)."""
    frame, heads = records_frame(records), _heads(records)
    sizes = sorted(frame.loc[frame["tp_size"] > 1, "tp_size"].unique())
    kinds = [
        _key("counted by the\nnetwork interface", marker="o"),
        _key("analytic: operands\nof a ring", marker="o", markersize=9, markerfacecolor="none"),
    ]
    notes = ["Counted bytes include the protocol's: some hundreds a message."]
    sent = frame.groupby("head")["sent_bytes_per_row"].max()
    if silent := [head for head in heads if not sent[head]]:
        notes.append(f"Sends nothing: {', '.join(silent)}.")
    if over := _oversubscribed(records):
        notes.append(f"{over}: bytes are exact all the same.")
    labels = "Bytes on the wire", "bytes that a rank sends for one row"

    def draw(axes: Axes, batch: pd.DataFrame) -> None:
        draw_bytes(axes, batch, heads, sizes)

    return _figure(records, labels, draw, kinds, notes)


def _heads(records: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(record.head for record in records))


def _oversubscribed(records: Sequence[Record]) -> str:
    over = {r.tp_size: r.oversubscription for r in records if r.oversubscribed}
    sizes = ", ".join(map(str, sorted(over)))
    return f"OVERSUBSCRIBED at tp {sizes} ({over[max(over)]})" if over else ""


def _key(label: str, **style: Any) -> Any:
    """An entry of the legend that says what a kind of mark means, whatever its head."""
    from matplotlib.lines import Line2D

    look: dict[str, Any] = {"color": "#333333", "linestyle": "none", "markersize": 5.5} | style
    return Line2D([], [], label=label, **look)


def _figure(
    records: Sequence[Record],
    labels: tuple[str, str],
    draw: Callable[[Axes, pd.DataFrame], None],
    kinds: list[Any],
    notes: list[str],
) -> Figure:
    """A panel a batch size, in rows of four at most, with legend, notes and provenance.

    labels: of the figure and of its vertical axis. kinds: legend entries besides the heads.
    """
    from matplotlib.figure import Figure

    batches = list(records_frame(records).groupby("batch_size"))
    columns = min(len(batches), _MAX_COLUMNS)
    rows = -(-len(batches) // columns)
    figure = Figure(figsize=(max(3.3 * columns, 4.4) + 2.1, 3.6 * rows + 1.3), layout="constrained")
    panels = list(figure.subplots(rows, columns, sharey=True, squeeze=False).flat)
    for unused in panels[len(batches) :]:
        unused.remove()
    for axes, (batch_size, batch) in zip(panels, batches, strict=False):
        draw(axes, batch)
        axes.set_title(f"batch {batch_size}", fontsize=10)
        axes.set_xlabel("tp_size (ranks)")
        axes.grid(visible=True, which="major", axis="y", alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    first = records[0]
    model = f"{first.model} (SYNTHETIC)" if first.synthetic else first.model
    figure.suptitle(f"{labels[0]}: {model}, {first.dtype}", x=0.01, ha="left", fontsize=11)
    figure.supylabel(labels[1], fontsize=10)
    handles = [*(_key(head, **style_of(head)) for head in _heads(records)), *kinds]
    figure.legend(handles=handles, loc="outside right center", frameon=False, fontsize=9)
    origin = (
        f"{first.system}: {first.device}, {first.backend}, threads a rank: "
        f"{first.threads_per_rank}; commit {first.commit}, {first.time_utc[:10]}."
    )
    width = round(figure.get_figwidth() * 16)
    lines = [textwrap.fill(text, width) for text in (" ".join(notes), origin)]
    figure.supxlabel("\n".join(lines), fontsize=8, x=0.01, ha="left")
    return figure


@dataclass(frozen=True)
class Mark:
    """A named point beside the front: its share of bytes, and both agreements."""

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
    """Draw a tuning's shares of misses against shares of bytes, both as powers of ten.

    records: every measured point; runnable: those that a real head runs, drawn solid. held_out:
        draw the front of the held-out states; the chosen point was chosen without them.

    Raises:
        UserError: matplotlib is missing, or the file cannot be written.
    """
    require_matplotlib("run pip install -e '.[report]', or pass --skip-plots")
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"font.size": 9}):
        figure = Figure(figsize=(7.2, 4.6), layout="constrained")
        axes = figure.add_subplot()
        prefix = "held_out_" if held_out else ""
        for name, key in (("overall", "top1"), ("worst source", "top1_worst")):
            color = _FRONT_COLORS[name]
            for points, style, what in (
                (records, "--", "simulated"),
                (runnable, ".-", "the head as it is"),
            ):
                if steps := curve(points, prefix + key):
                    x = [100 * record["bytes_share"] for record in steps]
                    misses = [_miss(record[prefix + key]) for record in steps]
                    axes.plot(x, misses, style, color=color, lw=1.3, label=f"{name}, {what}")
            for mark, marker in zip(marks, "sDv^P", strict=False):
                miss = _miss(getattr(mark, key))
                axes.plot(100 * mark.bytes_share, miss, marker, color=color, mfc="white", ms=7)
            if chosen is not None:
                x, miss = 100 * chosen["bytes_share"], _miss(chosen[prefix + key])
                axes.plot(x, miss, "*", color=color, ms=12, label=f"{name}, chosen")
        for mark, marker in zip(marks, "sDv^P", strict=False):
            axes.plot([], [], marker, color="#444444", mfc="white", ms=7, label=mark.label)
        _front_axes(axes, title)
        try:
            figure.savefig(path, dpi=150)
        except OSError as error:
            raise UserError(
                f"{path} cannot be written ({error.strerror}): give another --out"
            ) from error
    return path


def _miss(share: float) -> float:
    return 100 * max(1 - share, _LEAST_MISS)


def _front_axes(axes: Axes, title: str) -> None:
    def some_minor(value: float, _: object) -> str:
        leading = round(value / 10 ** len(str(int(value))[1:]), 6)
        return f"{value:g}" if leading in (2, 3, 5) else ""

    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.invert_yaxis()
    axes.set_xlabel("bytes read a token, % of the dense head's (bf16)")
    axes.set_ylabel("states whose dense argmax is found, %")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(some_minor)
    axes.yaxis.set_major_formatter(
        lambda value, _: "all" if value <= 100 * _LEAST_MISS else f"{100 - value:g}"
    )
    axes.grid(which="both", alpha=0.25, lw=0.5)
    axes.set_title(title, fontsize=9, loc="left")
    # Few points lie where few bytes find all.
    axes.legend(fontsize=7.5, loc="upper left", framealpha=0.9)
