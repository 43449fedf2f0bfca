"""Bytes on the wire: what the interface counted beside what the algorithm must send."""

from __future__ import annotations

from flashhead_dist.bench.records import Record
from flashhead_dist.report.chart import Chart
from flashhead_dist.report.plot_frame import heads_of
from flashhead_dist.report.plots import byte_shift, draw_bytes
from flashhead_dist.report.runs import Run
from flashhead_dist.report.section import Plot, Section, frame_of

KEY = "wire"
LARGE_BYTES = 512 * 1024
"""From this many bytes sent a step and rank on, the protocol's own bytes should not matter."""


def wire_section(run: Run) -> Section:
    """Counted and analytic bytes, and by how much they differ where messages are large."""
    sending = [record for record in run.records if record.tp_size > 1]
    if not sending:
        return Section(key=KEY, title="Bytes on the wire", missing="one rank sends nothing")
    heads = heads_of(run.records)
    silent = [h for h in heads if not any(r.sent_bytes_per_row for r in sending if r.head == h)]
    notes = [
        "Bytes that one rank sends for one row of the batch. The count includes the protocol's own "
        "bytes: some hundreds a message, whatever it carries."
    ]
    if silent:
        notes.append(f"Sends nothing: {', '.join(silent)}.")
    notes += _large_messages(sending)
    notes += _uncounted(sending)
    return Section(
        key=KEY,
        title="Bytes on the wire",
        notes=tuple(notes),
        frame=frame_of([_row(record) for record in sending]),
        plots=tuple(_plot(run, batch_size) for batch_size in run.batch_sizes),
        legend=tuple(head for head in heads if head not in silent),
        marks=(("o", "counted by the network interface"), ("h", "analytic: what a ring sends")),
    )


def _row(record: Record) -> dict[str, object]:
    counted, sent = record.counted_bytes_per_row, record.sent_bytes_per_row
    return {
        "batch_size": record.batch_size,
        "tp_size": record.tp_size,
        "head": record.head,
        "payload_bytes_per_row": record.payload_bytes_per_row,
        "sent_bytes_per_row": sent,
        "counted_bytes_per_row": counted,
        "counted_bytes_per_row_least": record.counted_bytes_per_row_least,
        "counted_bytes_per_row_greatest": record.counted_bytes_per_row_greatest,
        "protocol_bytes_per_row": None if counted is None else counted - sent,
        "counted_over_sent": counted / sent if counted and sent else None,
        "counted_reason": record.counted_reason,
    }


def _large_messages(records: list[Record]) -> list[str]:
    """The greatest difference of counted from analytic bytes over large messages, and the rest."""
    off = {
        (r.head, r.tp_size, r.batch_size): r.counted_bytes_per_row / r.sent_bytes_per_row - 1
        for r in records
        if r.counted_bytes_per_row and r.sent_bytes_per_row * r.batch_size >= LARGE_BYTES
    }
    small = [
        r.counted_bytes_per_row * r.batch_size - r.sent_bytes_per_row * r.batch_size
        for r in records
        if r.counted_bytes_per_row and 0 < r.sent_bytes_per_row * r.batch_size < 4096
    ]
    notes = []
    if off:
        (head, tp_size, batch_size), worst = max(off.items(), key=lambda item: abs(item[1]))
        notes.append(
            f"Steps in which a rank sends over 512 KiB: the count differs from the analytic bytes "
            f"by {100 * worst:+.2f} % at most ({head}, tp {tp_size}, batch {batch_size})."
        )
    if small:
        notes.append(
            f"Steps in which it sends under 4 KiB: the protocol adds {min(small):,.0f} to "
            f"{max(small):,.0f} bytes a step and rank."
        )
    return notes


def _uncounted(records: list[Record]) -> list[str]:
    reasons = {r.counted_reason for r in records if r.counted_bytes_per_row is None}
    return [f"Counted bytes are missing, because {reason}." for reason in sorted(reasons, key=str)]


def _plot(run: Run, batch_size: int) -> Plot:
    batch = [r for r in run.records if r.batch_size == batch_size and r.tp_size > 1]
    sizes = sorted({record.tp_size for record in run.records if record.tp_size > 1})
    heads = heads_of(run.records)
    chart = Chart(f"{KEY}-{run.letter}-b{batch_size}", f"Bytes sent for a row, batch {batch_size}")
    draw_bytes(chart.axes, batch, heads, sizes)
    chart.axes.set_xlabel("tp_size (ranks)")
    for record in batch:
        if not record.sent_bytes_per_row:
            continue
        x = sizes.index(record.tp_size) + byte_shift(heads.index(record.head), len(heads))
        counted = record.counted_bytes_per_row
        shown = "not counted" if counted is None else f"{counted:,.0f} counted"
        words = f"{record.head}, tp {record.tp_size}: {record.sent_bytes_per_row:,.0f} B analytic"
        chart.spot(x, record.sent_bytes_per_row, f"{words}, {shown}")
    return chart.plot()
