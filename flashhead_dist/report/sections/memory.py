"""Memory of a rank: the head's weights there, an even share of them, and the peak while loading."""

from __future__ import annotations

from flashhead_dist.bench.records import Record
from flashhead_dist.report.chart import Chart
from flashhead_dist.report.plot_frame import style_of
from flashhead_dist.report.plots import plain_numbers, side_by_side, size_axis
from flashhead_dist.report.runs import Run
from flashhead_dist.report.section import Plot, Section, frame_of

KEY = "memory"


def memory_section(run: Run) -> Section:
    """Weights and peak by head and `tp_size`, which no batch size changes."""
    records = first_of_each_size(run)
    notes = [
        "Weights: of the rank that holds most. Even share: what the head holds at tp 1, over tp. "
        "Peak: the most a rank held beyond what it had before, while it loaded the head and ran "
        "it once."
    ]
    if any(record.workspace_bytes_per_rank is not None for record in run.records):
        notes.append(
            "Workspace: the most that a step holds beyond weights, at the batch size that needs "
            "most: kernels' workspaces, logits, operands of exchanges."
        )
    reasons = {r.peak_reason for r in records if r.peak_bytes_per_rank is None}
    notes += [f"Peaks are missing, because {reason}." for reason in sorted(reasons, key=str)]
    return Section(
        key=KEY,
        title="Memory of a rank",
        notes=tuple(notes),
        frame=frame_of([_row(run, record) for record in records]),
        plots=(_plot(run, records, "weight"), _plot(run, records, "peak")),
        legend=tuple(run.heads),
    )


def first_of_each_size(run: Run) -> list[Record]:
    """The first record of each head and `tp_size`: for figures that no batch size changes."""
    first: dict[tuple[int, str], Record] = {}
    for record in run.records:
        first.setdefault((record.tp_size, record.head), record)
    return [first[key] for key in sorted(first, key=lambda key: (key[0], run.heads.index(key[1])))]


def _row(run: Run, record: Record) -> dict[str, object]:
    whole = next((r for r in run.records if r.head == record.head and r.tp_size == 1), None)
    even = whole.weight_bytes_per_rank / record.tp_size if whole else None
    return {
        "tp_size": record.tp_size,
        "head": record.head,
        "weight_bytes_per_rank": record.weight_bytes_per_rank,
        "even_share_bytes": even,
        "over_even_share": record.weight_bytes_per_rank / even - 1 if even else None,
        "peak_bytes_per_rank": record.peak_bytes_per_rank,
        "workspace_bytes_per_rank": _most_workspace(run, record),
    }


def _most_workspace(run: Run, of: Record) -> int | None:
    """Over the batch sizes of the record's head and `tp_size`; None where no record knows it."""
    same = [r for r in run.records if (r.head, r.tp_size) == (of.head, of.tp_size)]
    known = [r.workspace_bytes_per_rank for r in same if r.workspace_bytes_per_rank is not None]
    return max(known, default=None)


def _plot(run: Run, records: list[Record], what: str) -> Plot:
    title = {"weight": "Weights of a rank", "peak": "Peak of a rank while loading"}[what]
    chart = Chart(f"{KEY}-{what}-{run.letter}", title)
    for position, head in enumerate(run.heads):
        points = []
        for record in records:
            value = getattr(record, f"{what}_bytes_per_rank")
            if record.head != head or value is None:
                continue
            x, y = record.tp_size * side_by_side(position, len(run.heads)), value / 1e6
            words = f"{head}, tp {record.tp_size}: {y:,.1f} MB"
            chart.point(x, y, words, **style_of(head) | {"linestyle": "none"})
            points.append((x, y))
        chart.axes.plot(
            [x for x, _ in points],
            [y for _, y in points],
            color=style_of(head)["color"],
            linewidth=0.9,
            alpha=0.6,
        )
    chart.axes.set_yscale("log")
    plain_numbers(chart.axes)
    size_axis(chart.axes, run.tp_sizes)
    chart.axes.set_xlabel("tp_size (ranks)")
    chart.axes.set_ylabel("MB")
    return chart.plot()
