"""How often each head finds the dense head's token, overall and in the worst source of texts."""

from __future__ import annotations

from math import sqrt

from flashhead_dist.bench.records import Record
from flashhead_dist.heads.registry import HEADS
from flashhead_dist.report.chart import Chart
from flashhead_dist.report.plot_frame import style_of
from flashhead_dist.report.runs import Run
from flashhead_dist.report.section import Plot, Section, frame_of
from flashhead_dist.report.sections.memory import first_of_each_size

KEY = "fidelity"
_Z95 = 1.959964


def fidelity_section(run: Run) -> Section:
    """Agreement by head and `tp_size`; the plot shows each head's worst `tp_size`."""
    records = [r for r in first_of_each_size(run) if r.top1_agreement is not None]
    if not records:
        why = (
            "the run had no test states, as of a made-up model"
            if run.first.synthetic
            else ("the run was told to take no test states (--max-states 0)")
        )
        return Section(key=KEY, title="Fidelity to the dense head", missing=why)
    notes = [
        "Share of test states whose best token is the dense head's, computed in float32 with ties "
        "to the smaller id. Bars: 95 % interval of that share, for states drawn like these "
        "(Wilson). The worst of many sources is chosen after the fact, so it looks worse than a "
        "source is expected to be; one miss of 20 states is 5 %."
    ]
    rounding = [name for name in run.heads if name in HEADS and HEADS[name].rounds_logits]
    if rounding:
        notes.append(
            f"{' and '.join(rounding)}: logits rounded to {run.first.dtype} are compared, where "
            f"many tie, so the misses are ties."
        )
    return Section(
        key=KEY,
        title="Fidelity to the dense head",
        notes=tuple(notes),
        frame=frame_of([_row(record) for record in records]),
        plots=(_plot(run, records),),
        marks=(("o", "all test states"), ("h", "worst source of texts")),
    )


def wilson_interval(share: float, number: int) -> tuple[float, float]:
    """95 % interval of a share of `number` trials.

    Wilson, J. Am. Stat. Assoc. 22 (1927) 209: holds near 0 and 1 too, where the usual one fails.
    """
    middle = (share + _Z95**2 / (2 * number)) / (1 + _Z95**2 / number)
    half = _Z95 * sqrt(share * (1 - share) / number + _Z95**2 / (4 * number**2))
    half /= 1 + _Z95**2 / number
    return max(0.0, middle - half), min(1.0, middle + half)


def _row(record: Record) -> dict[str, object]:
    share, number = record.top1_agreement, record.num_agreement_states
    low, high = wilson_interval(share, number) if share is not None and number else (None, None)
    return {
        "tp_size": record.tp_size,
        "head": record.head,
        "top1_agreement": share,
        "top1_agreement_low": low,
        "top1_agreement_high": high,
        "num_agreement_states": number,
        "top1_agreement_worst_source": record.top1_agreement_worst_source,
        "worst_source": record.worst_source,
        "num_worst_source_states": record.num_worst_source_states,
    }


def _plot(run: Run, records: list[Record]) -> Plot:
    heads = list(dict.fromkeys(record.head for record in records))
    chart = Chart(
        f"{KEY}-{run.letter}",
        "Dense token found, at the worst tp_size",
        height_px=70 + 26 * len(heads),
    )
    for place, head in enumerate(heads):
        record = min((r for r in records if r.head == head), key=lambda r: r.top1_agreement or 0.0)
        share, worst = record.top1_agreement or 0.0, record.top1_agreement_worst_source
        style = style_of(head) | {"linestyle": "none"}
        low, high = wilson_interval(share, record.num_agreement_states)
        chart.axes.hlines(place, low, high, color=style["color"], linewidth=1.4)
        shown = f"{head}, tp {record.tp_size}"
        if worst is not None:
            words = f"{shown}: {100 * worst:.1f} % in {record.worst_source}"
            words += f" ({record.num_worst_source_states} states)"
            chart.axes.hlines(place, worst, share, color=style["color"], lw=0.6, alpha=0.5)
            chart.point(worst, place, words, **style | {"markerfacecolor": "white"})
        chart.point(share, place, f"{shown}: {100 * share:.2f} %", **style)
        label = f"{100 * share:.2f}" if worst is None else f"{100 * share:.2f} / {100 * worst:.1f}"
        chart.axes.text(1.05, place, label, va="center", fontsize=7.5)
    chart.axes.set_yticks(range(len(heads)), heads)
    chart.axes.set_ylim(len(heads) - 0.5, -0.5)
    chart.axes.set_xlim(0, 1.33)
    chart.axes.set_xticks([0, 0.25, 0.5, 0.75, 1.0])
    chart.axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    chart.axes.grid(visible=False, axis="y")
    chart.axes.grid(visible=True, axis="x")
    return chart.plot()
