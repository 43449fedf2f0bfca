"""Pictures of a run: latency and bytes against `tp_size`, one panel a batch size.

A measured point is filled and its line solid; a projected one is hollow and its line dashed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashhead_dist.errors import UserError
from flashhead_dist.measure.records import Record, cannot_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LATENCY_NAME = "latency.png"
BYTES_NAME = "bytes.png"

# Okabe and Ito's palette, told apart by colour-blind readers; markers differ as well.
_STYLES = {
    "dense_gather": ("#E69F00", "s"),
    "dense_allreduce": ("#D55E00", "D"),
    "dense_local_max": ("#000000", "o"),
    "flashhead_replicated": ("#56B4E9", "v"),
    "flashhead_global": ("#009E73", "^"),
    "flashhead": ("#0072B2", "o"),
    "faiss_ivf": ("#CC79A7", "X"),
}
_OTHER_STYLE = ("#777777", "P")


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
    """Latency of a step against `tp_size`, logarithmic both, with a band from p10 to p90."""
    figure, panels = _panels(records)
    for axes, (batch_size, batch) in zip(panels, _by_batch(records), strict=True):
        axes.set_title(f"batch {batch_size}", fontsize=10)
        for head in _heads(records):
            _latency_line(axes, head, [r for r in batch if r.head == head])
        axes.set_yscale("log")
        _plain_numbers(axes)
        _tp_axis(axes, batch)
    panels[0].set_ylabel("microseconds a step (slowest rank, median)")
    projected = any(not record.measured for record in records)
    _finish(figure, panels[0], records, "Latency of the output head", projected)
    return figure


def _latency_line(axes: Axes, head: str, records: Sequence[Record]) -> None:
    color, marker = _STYLES.get(head, _OTHER_STYLE)
    points = sorted((r for r in records if r.median_us is not None), key=lambda r: r.tp_size)
    measured = [record for record in points if record.measured]
    style: dict[str, Any] = {"color": color, "marker": marker, "markersize": 6, "linewidth": 1.6}
    if measured:
        sizes = [record.tp_size for record in measured]
        axes.plot(sizes, [r.median_us or 0.0 for r in measured], label=head, **style)
        axes.fill_between(
            sizes,
            [record.p10_us or 0.0 for record in measured],
            [record.p90_us or 0.0 for record in measured],
            color=color,
            alpha=0.15,
            linewidth=0,
        )
    projected = [record for record in points if not record.measured]
    if projected:
        # The dashed line starts at the last measured point, whose own marker is drawn already.
        joined = [*measured[-1:], *projected]
        axes.plot(
            [record.tp_size for record in joined],
            [record.median_us or 0.0 for record in joined],
            color=color,
            linestyle="--",
            linewidth=1.2,
        )
        axes.plot(
            [record.tp_size for record in projected],
            [record.median_us or 0.0 for record in projected],
            label=None if measured else head,
            **{**style, "linestyle": "none", "markerfacecolor": "white"},
        )


def bytes_figure(records: Sequence[Record]) -> Figure:
    """Bytes that a rank sends for one row: counted (filled) inside analytic (ring)."""
    figure, panels = _panels(records)
    heads = _heads(records)
    for axes, (batch_size, batch) in zip(panels, _by_batch(records), strict=True):
        axes.set_title(f"batch {batch_size}", fontsize=10)
        for position, head in enumerate(heads):
            # Heads that send the same would hide each other.
            _bytes_lines(axes, head, batch, shift=2 ** (0.07 * (position - (len(heads) - 1) / 2)))
        axes.set_yscale("log")
        _tp_axis(axes, [record for record in batch if record.tp_size > 1])
    panels[0].set_ylabel("bytes sent a rank and row")
    _finish(figure, panels[0], records, "Bytes on the wire", projected=False)
    figure.text(
        0.01,
        0.035,
        "filled, solid: counted by the interface, protocol included.  rings, dotted: analytic, "
        "payload of a ring.  Points of one tp_size are set side by side.",
        fontsize=8,
    )
    return figure


def _bytes_lines(axes: Axes, head: str, batch: Sequence[Record], shift: float) -> None:
    color, marker = _STYLES.get(head, _OTHER_STYLE)
    mine = sorted(
        (r for r in batch if r.head == head and r.sent_bytes_per_row > 0), key=lambda r: r.tp_size
    )
    counted = [record for record in mine if (record.counted_bytes_per_row or 0) > 0]
    axes.plot(
        [record.tp_size * shift for record in counted],
        [record.counted_bytes_per_row or 0.0 for record in counted],
        label=head if mine else f"{head} (sends nothing)",
        color=color,
        marker=marker,
        markersize=4,
        linewidth=1.4,
    )
    axes.plot(
        [record.tp_size * shift for record in mine],
        [record.sent_bytes_per_row for record in mine],
        color=color,
        marker=marker,
        markersize=8,
        markerfacecolor="none",
        linestyle=":",
        linewidth=1.2,
    )


def _panels(records: Sequence[Record]) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    num_panels = len(_by_batch(records))
    figure = Figure(figsize=(max(6.5, 3.6 * num_panels + 2.2), 4.8))
    axes = figure.subplots(1, num_panels, sharey=True, squeeze=False)
    return figure, list(axes[0])


def _by_batch(records: Sequence[Record]) -> list[tuple[int, list[Record]]]:
    sizes = sorted({record.batch_size for record in records})
    return [(size, [r for r in records if r.batch_size == size]) for size in sizes]


def _heads(records: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(record.head for record in records))


def _tp_axis(axes: Axes, records: Sequence[Record]) -> None:
    sizes = sorted({record.tp_size for record in records})
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.xaxis.minorticks_off()
    axes.yaxis.minorticks_off()
    axes.set_xlabel("tp_size")
    axes.grid(visible=True, which="major", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _plain_numbers(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def _finish(
    figure: Figure, axes: Axes, records: Sequence[Record], title: str, projected: bool
) -> None:
    first = records[0]
    model = f"{first.model} (SYNTHETIC)" if first.synthetic else first.model
    figure.suptitle(
        f"{title}: {model}, {first.dtype}, {first.system}, {first.backend}", fontsize=11
    )
    over = {r.tp_size: r.oversubscription for r in records if r.oversubscribed}
    if over:
        worst = over[max(over)]
        sizes = ", ".join(str(size) for size in sorted(over))
        meaning = (
            "hollow, dashed: PROJECTED from each rank's compute measured alone"
            if projected
            else "bytes are exact all the same"
        )
        figure.text(0.01, 0.01, f"OVERSUBSCRIBED at tp {sizes} ({worst}).  {meaning}.", fontsize=8)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="center right", frameon=False, fontsize=9)
    figure.subplots_adjust(
        left=0.09, right=1 - 2.2 / figure.get_figwidth(), top=0.86, bottom=0.19, wspace=0.08
    )
