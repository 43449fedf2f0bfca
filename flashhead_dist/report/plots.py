"""Pictures of a run: latency and bytes against `tp_size`, one panel a batch size.

Latency: a measured point is filled and its line solid; a projected one is hollow, its line dashed
and its ground grey. Bytes: the count is filled, the analytic figure a ring around or below it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flashhead_dist.bench.records import Record, cannot_write
from flashhead_dist.errors import UserError
from flashhead_dist.heads.registry import BASELINE
from flashhead_dist.report.plot_frame import (
    PROJECTED_GROUND,
    by_batch,
    finish,
    heads_of,
    key,
    make_panels,
    style_of,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LATENCY_NAME = "latency.png"
BYTES_NAME = "bytes.png"
_HALF_STEP = 2**0.4
"""Room left and right of the outer sizes, on an axis of base 2."""


def write_plots(records: Sequence[Record], folder: Path) -> list[Path]:
    """Draw the pictures that the records allow into `folder` and return their paths.

    Bytes are drawn only where some rank count sends any.

    Raises:
        UserError: matplotlib is missing, or the folder cannot be written.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError(
            "plots need matplotlib, which is not installed: run pip install 'flashhead-dist"
            "[report]', or pass --skip-plots"
        ) from error
    paths: list[Path] = []
    pictures = [(LATENCY_NAME, latency_figure(records))]
    if any(record.sent_bytes_per_row > 0 for record in records):
        pictures.append((BYTES_NAME, bytes_figure(records)))
    for name, figure in pictures:
        path = folder / name
        try:
            figure.savefig(path, dpi=150)
        except OSError as error:
            raise cannot_write(path, error) from error
        paths.append(path)
    return paths


def latency_figure(records: Sequence[Record]) -> Figure:
    """Latency of a step against `tp_size`, logarithmic both, with bars from p10 to p90."""
    figure, panels = make_panels(len(by_batch(records)))
    heads = heads_of(records)
    for axes, (_, batch) in zip(panels, by_batch(records), strict=True):
        draw_latency(axes, batch, heads)
    notes = ["Bars: p10 to p90 over iterations."]
    kinds = [key("measured", marker="o", linestyle="-")]
    over = {r.tp_size: r.oversubscription for r in records if r.oversubscribed}
    if over:
        sizes = ", ".join(str(size) for size in sorted(over))
        notes.append(
            f"OVERSUBSCRIBED at tp {sizes} ({over[max(over)]}): what stands there is PROJECTED "
            f"from each rank's compute measured alone and a model of communication."
        )
        kinds.append(key("PROJECTED", marker="o", linestyle="--", markerfacecolor="white"))
    if any(record.median_us is None for record in records):
        notes.append("Left out: sizes whose communication is not known.")
    if any(r.head == BASELINE and r.tp_size == 1 and r.median_us for r in records):
        kinds.append(key(f"ideal: {BASELINE}\nat tp 1, over tp", linestyle=":", color="#777777"))
    finish(figure, panels, records, "Latency of the output head", kinds, notes)
    figure.supylabel("microseconds a step: slowest rank, median", fontsize=10)
    return figure


def draw_latency(axes: Axes, batch: Sequence[Record], heads: Sequence[str]) -> None:
    """One panel of latencies: the records of one batch size, with bars and the ideal line."""
    projected_ground(axes, batch)
    _ideal_line(axes, batch)
    for position, head in enumerate(heads):
        mine = [record for record in batch if record.head == head]
        _latency_line(axes, head, mine, side_by_side(position, len(heads)))
    axes.set_yscale("log")
    plain_numbers(axes)
    size_axis(axes, sorted({record.tp_size for record in batch}))


def side_by_side(position: int, number: int) -> float:
    """A factor of `tp_size` at which points of one size do not hide each other's bars."""
    return float(2 ** (0.03 * (position - (number - 1) / 2)))


def _latency_line(axes: Axes, head: str, records: Sequence[Record], shift: float) -> None:
    style = style_of(head)
    points = sorted((r for r in records if r.median_us is not None), key=lambda r: r.tp_size)
    measured = [record for record in points if record.measured]
    projected = [record for record in points if not record.measured]
    if measured:
        axes.plot(
            [record.tp_size * shift for record in measured],
            [record.median_us or 0.0 for record in measured],
            linestyle="-",
            **style,
        )
        axes.vlines(
            [record.tp_size * shift for record in measured],
            [record.p10_us or 0.0 for record in measured],
            [record.p90_us or 0.0 for record in measured],
            color=style["color"],
            linewidth=1.0,
        )
    if projected:
        # The dashed line starts at the last measured point, whose own marker is drawn already.
        joined = [*measured[-1:], *projected]
        axes.plot(
            [record.tp_size * shift for record in joined],
            [record.median_us or 0.0 for record in joined],
            color=style["color"],
            linestyle="--",
            linewidth=1.0,
        )
        axes.plot(
            [record.tp_size * shift for record in projected],
            [record.median_us or 0.0 for record in projected],
            **{**style, "linestyle": "none", "markerfacecolor": "white"},
        )


def projected_ground(axes: Axes, batch: Sequence[Record], word: str = "PROJECTED") -> None:
    """Grey behind the oversubscribed sizes, from half-way to the last one measured."""
    projected = [record.tp_size for record in batch if not record.measured]
    if not projected:
        return
    first, last = min(projected), max(record.tp_size for record in batch)
    before = [r.tp_size for r in batch if r.measured and r.tp_size < first]
    start = (first * max(before)) ** 0.5 if before else first / _HALF_STEP
    stop = last * _HALF_STEP
    axes.axvspan(start, stop, color=PROJECTED_GROUND, linewidth=0, zorder=0)
    axes.text(
        (start * stop) ** 0.5,
        0.985,
        word,
        transform=axes.get_xaxis_transform(),
        ha="center",
        va="top",
        fontsize=7,
        color="#555555",
    )


def _ideal_line(axes: Axes, batch: Sequence[Record]) -> None:
    """What the dense baseline would take if ranks divided it and exchanged nothing."""
    sizes = sorted({record.tp_size for record in batch})
    for record in batch:
        if record.head == BASELINE and record.tp_size == 1 and record.median_us:
            ideal = [record.median_us / size for size in sizes]
            axes.plot(sizes, ideal, color="#777777", linestyle=":", linewidth=1.2, zorder=1)


def bytes_figure(records: Sequence[Record]) -> Figure:
    """Bytes that a rank sends for one row: counted (filled) and analytic (ring)."""
    figure, panels = make_panels(len(by_batch(records)))
    sizes = sorted({record.tp_size for record in records if record.tp_size > 1})
    heads = heads_of(records)
    for axes, (_, batch) in zip(panels, by_batch(records), strict=True):
        draw_bytes(axes, batch, heads, sizes)
    kinds = [
        key("counted by the\nnetwork interface", marker="o"),
        key("analytic: operands\nof a ring", marker="o", markersize=9, markerfacecolor="none"),
    ]
    notes = ["Counted bytes include the protocol's: some hundreds a message, whatever it carries."]
    silent = [head for head in heads if not any(_sends(r) for r in records if r.head == head)]
    if silent:
        notes.append(f"Sends nothing: {', '.join(silent)}.")
    over = {r.tp_size: r.oversubscription for r in records if r.oversubscribed}
    if over:
        sizes_over = ", ".join(str(size) for size in sorted(over))
        notes.append(
            f"OVERSUBSCRIBED at tp {sizes_over} ({over[max(over)]}): bytes are exact all the same."
        )
    finish(figure, panels, records, "Bytes on the wire", kinds, notes)
    figure.supylabel("bytes that a rank sends for one row", fontsize=10)
    return figure


def draw_bytes(
    axes: Axes, batch: Sequence[Record], heads: Sequence[str], sizes: Sequence[int]
) -> None:
    """One panel of bytes: the records of one batch size, a column for each of `sizes`."""
    for position, head in enumerate(heads):
        mine = [record for record in batch if record.head == head]
        _bytes_points(axes, head, mine, sizes, byte_shift(position, len(heads)))
    axes.set_yscale("log")
    axes.set_xticks(range(len(sizes)), [str(size) for size in sizes])
    axes.set_xlim(-0.5, len(sizes) - 0.5)
    for edge in range(1, len(sizes)):
        axes.axvline(edge - 0.5, color="#BBBBBB", linewidth=0.8)
    _byte_numbers(axes)


def byte_shift(position: int, number: int) -> float:
    """How far beside the middle of its column a head's bytes are drawn."""
    return 0.78 * (position - (number - 1) / 2) / number


def _sends(record: Record) -> bool:
    return record.sent_bytes_per_row > 0


def _bytes_points(
    axes: Axes, head: str, records: Sequence[Record], sizes: Sequence[int], shift: float
) -> None:
    """Rings at the analytic bytes, points at the counted ones, a thin line from one to the other.

    A size stands at its place in `sizes`, and a head beside it by `shift`.
    """
    style = style_of(head) | {"linestyle": "none"}
    mine = sorted(filter(_sends, records), key=lambda r: r.tp_size)
    counted = [record for record in mine if (record.counted_bytes_per_row or 0) > 0]
    places = {record.tp_size: sizes.index(record.tp_size) + shift for record in mine}
    at_counted = [places[record.tp_size] for record in counted]
    axes.plot(
        [places[record.tp_size] for record in mine],
        [record.sent_bytes_per_row for record in mine],
        **{**style, "markersize": 1.5 * style["markersize"], "markerfacecolor": "none"},
    )
    axes.plot(at_counted, [record.counted_bytes_per_row or 0.0 for record in counted], **style)
    axes.vlines(
        at_counted,
        [record.sent_bytes_per_row for record in counted],
        [record.counted_bytes_per_row or 0.0 for record in counted],
        color=style["color"],
        linewidth=0.8,
    )


def size_axis(axes: Axes, sizes: Sequence[int]) -> None:
    """A horizontal axis of base 2 that is marked at `sizes` alone."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.xaxis.minorticks_off()
    axes.set_xlim(sizes[0] / _HALF_STEP, sizes[-1] * _HALF_STEP)


def plain_numbers(axes: Axes) -> None:
    """A logarithmic vertical axis marked 1, 2, 5, 10 in plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}")
    )
    axes.yaxis.minorticks_off()


def _byte_numbers(axes: Axes) -> None:
    from matplotlib.ticker import EngFormatter, LogLocator

    axes.yaxis.set_major_locator(LogLocator(numticks=12))
    axes.yaxis.set_major_formatter(EngFormatter(unit="B", places=0))
    axes.yaxis.minorticks_off()
