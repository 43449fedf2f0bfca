"""Projections to systems that were not measured: plots and figures of their own."""

from __future__ import annotations

from collections.abc import Sequence

from flashhead_dist.heads.registry import BASELINE
from flashhead_dist.report.chart import Chart
from flashhead_dist.report.model_error import ModelError
from flashhead_dist.report.outlook import Outlook
from flashhead_dist.report.plot_frame import PROJECTED_GROUND, style_of
from flashhead_dist.report.plots import plain_numbers, size_axis
from flashhead_dist.report.section import Plot, Section, frame_of
from flashhead_dist.report.verdict import PRODUCT

KEY = "projection"


def projection_section(found: Sequence[Outlook], error: ModelError) -> Section:
    """A plot a system and batch size, hollow and dashed on grey, with the model's error band."""
    notes = [
        "PROJECTED by the cost model (docs/cost_model.md) from the shape of the heads alone: no "
        "figure here was measured, on this machine or on that one.",
        error.words,
    ]
    cells = list(dict.fromkeys((o.system.name, o.batch_size) for o in found))
    for name, batch_size in cells:
        mine = [o for o in found if (o.system.name, o.batch_size) == (name, batch_size)]
        notes += _words(mine)
    left_out = sorted({o.left_out for o in found if o.left_out})
    notes += [f"Left out: {'; '.join(left_out)}."] if left_out else []
    return Section(
        key=KEY,
        title="Projection to other systems",
        notes=tuple(notes),
        frame=frame_of([row for outlook in found for row in _rows(outlook)]),
        plots=tuple(
            _plot([o for o in found if (o.system.name, o.batch_size) == cell]) for cell in cells
        ),
        legend=tuple(dict.fromkeys(outlook.head for outlook in found)),
        marks=(("h--", "PROJECTED"),),
    )


def _words(outlooks: Sequence[Outlook]) -> list[str]:
    """What the product is projected to gain there, and from which rank count nothing more."""
    by_head = {outlook.head: outlook for outlook in outlooks}
    product, dense = by_head.get(PRODUCT), by_head.get(BASELINE)
    if product is None or not product.costs:
        return []
    name, batch_size = product.system.name, product.batch_size
    first = min(product.costs)
    text = (
        f"{name}, batch {batch_size}: {PRODUCT} is PROJECTED to take "
        f"{_us(product.costs[first].total_s)} on {_ranks(first)}"
    )
    if dense is not None and first in dense.costs:
        ratio = dense.costs[first].total_s / product.costs[first].total_s
        text += f", where {BASELINE} takes {_us(dense.costs[first].total_s)} ({ratio:.1f} times)"
    best = product.best_size
    at_best = product.costs[best]
    if best == max(product.costs):
        return [f"{text}; every further rank count up to {best} is faster."]
    if best == first:
        text += "; more ranks gain nothing, as the exchange takes more than they save"
    else:
        gain = product.costs[first].total_s / at_best.total_s
        text += (
            f"; it is fastest on {_ranks(best)}, {_us(at_best.total_s)} ({gain:.2f} times), of "
            f"which the exchange is {_us(at_best.exchange_s)}, and from there on the exchange "
            f"eats the gain of more"
        )
    if dense is not None and dense.costs and dense.best_size != max(dense.costs):
        text += f"; {BASELINE} is fastest on {_ranks(dense.best_size)}"
        text += f", {_us(dense.costs[dense.best_size].total_s)}"
    return [f"{text}."]


def _rows(outlook: Outlook) -> list[dict[str, object]]:
    return [
        {
            "system": outlook.system.name,
            "batch_size": outlook.batch_size,
            "head": outlook.head,
            "tp_size": size,
            "projected_step_us": cost.total_s * 1e6,
            "projected_low_us": outlook.bands[size][0] * 1e6,
            "projected_high_us": outlook.bands[size][1] * 1e6,
            "projected_compute_us": cost.compute_s * 1e6,
            "projected_exchange_us": cost.exchange_s * 1e6,
            "projected_read_bytes": cost.read_bytes,
            "projected_sent_bytes": cost.sent_bytes,
            "projected_weight_bytes_per_rank": cost.weight_bytes,
            "carried_by": cost.how,
        }
        for size, cost in outlook.costs.items()
    ]


def _plot(outlooks: Sequence[Outlook]) -> Plot:
    first = outlooks[0]
    name, batch_size = first.system.name, first.batch_size
    key = "".join(c if c.isalnum() else "-" for c in name)
    chart = Chart(f"{KEY}-{key}-b{batch_size}", f"PROJECTED: {name}, batch {batch_size}")
    axes = chart.axes
    axes.set_facecolor(PROJECTED_GROUND)
    for outlook in outlooks:
        if not outlook.costs:
            continue
        style = style_of(outlook.head) | {"markerfacecolor": "white", "markersize": 5.0}
        sizes = sorted(outlook.costs)
        us = [outlook.costs[size].total_s * 1e6 for size in sizes]
        low, high = ([outlook.bands[size][end] * 1e6 for size in sizes] for end in (0, 1))
        axes.fill_between(sizes, low, high, color=style["color"], alpha=0.18, linewidth=0)
        axes.plot(sizes, us, color=style["color"], linestyle="--", linewidth=1.0)
        for size, value in zip(sizes, us, strict=True):
            words = f"{outlook.head}, {_ranks(size)}: {_us(value * 1e-6)} (PROJECTED)"
            chart.point(size, value, words, **style | {"linestyle": "none"})
    drawn = sorted({size for outlook in outlooks for size in outlook.costs})
    for level in first.system.levels[:-1]:
        if drawn[0] < level.ranks < drawn[-1]:
            axes.axvline(level.ranks * 2**0.5, color="#6B7280", linewidth=0.7, linestyle=":")
            axes.text(
                level.ranks * 2**0.42,
                0.985,
                level.name,
                transform=axes.get_xaxis_transform(),
                ha="right",
                va="top",
                fontsize=7,
                color="#555555",
            )
    axes.set_yscale("log")
    plain_numbers(axes)
    size_axis(axes, drawn)
    axes.set_xlabel("tp_size (ranks)")
    axes.set_ylabel("µs a step, PROJECTED")
    return chart.plot(name)


def _us(seconds: float) -> str:
    us = seconds * 1e6
    return f"{us:,.0f} µs" if us >= 100 else f"{us:.1f} µs"


def _ranks(number: int) -> str:
    return f"{number} rank{'' if number == 1 else 's'}"
