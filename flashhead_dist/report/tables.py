"""Terminal tables of a run: latency and bytes by batch size, then memory and agreement.

A projected figure never shares a column with a measured one: oversubscribed sizes have tables of
their own, and every table says on what it was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from rich import box
from rich.table import Table

from flashhead_dist.bench.records import Record

UNKNOWN = "-"
_Cells = Callable[[Record], tuple[str, ...]]


def latency_tables(records: Sequence[Record]) -> list[Table]:
    """For each batch size the measured table, then the projected one where there is one."""
    tables: list[Table] = []
    for batch_size in sorted({record.batch_size for record in records}):
        batch = [record for record in records if record.batch_size == batch_size]
        measured = [record for record in batch if record.measured]
        projected = [record for record in batch if not record.measured]
        if measured:
            tables.append(_measured_table(batch_size, measured))
        if projected:
            tables.append(_projected_table(batch_size, projected))
    return tables


def _measured_table(batch_size: int, records: Sequence[Record]) -> Table:
    table = _table(f"Batch {batch_size}: measured", _setting(records))
    _columns(table, "median us", "p10", "p90", "compute us", "comm. us", "x dense", "eff. %")
    _columns(table, "payload B/row", "sent B/row", "counted B/row")
    _rows(
        table,
        records,
        lambda r: (
            _us(r.median_us),
            _us(r.p10_us),
            _us(r.p90_us),
            _us(r.compute_us),
            _us(r.communication_us),
            _times(r.speedup_over_dense_local_max),
            _percent(r.scaling_efficiency, 0),
            *_bytes_cells(r),
        ),
    )
    return table


def _projected_table(batch_size: int, records: Sequence[Record]) -> Table:
    caption = (
        f"OVERSUBSCRIBED: {_ranks_on(records)}. alone us: the slowest rank's compute, measured "
        f"while all others sleep. proj. comm. and proj. total: PROJECTED, not measured. wall us: "
        f"what the clock saw with the ranks taking turns, no latency of any machine.\n"
        f"{_setting(records)}"
    )
    table = _table(f"Batch {batch_size}: PROJECTED (oversubscribed)", caption)
    _columns(table, "alone us", "proj. comm. us", "proj. total us", "proj. x dense", "proj. eff. %")
    _columns(table, "wall us", "payload B/row", "sent B/row", "counted B/row")
    _rows(
        table,
        records,
        lambda r: (
            _us(r.compute_us),
            _us(r.communication_us),
            _us(r.median_us),
            _times(r.speedup_over_dense_local_max),
            _percent(r.scaling_efficiency, 0),
            _us(r.wall_median_us),
            *_bytes_cells(r),
        ),
    )
    return table


def head_table(records: Sequence[Record]) -> Table:
    """Memory and agreement of each head at each `tp_size`, which no batch size changes."""
    num_states = max((record.num_agreement_states for record in records), default=0)
    caption = (
        f"top-1: share of {num_states:,} test states whose best token is the dense head's, which "
        f"breaks ties by id in float32; dense_gather and dense_allreduce compare logits rounded to "
        f"{records[0].dtype}, where many tie. worst source: its share, name and number of states. "
        f"over share: the largest rank's weights against those at tp 1 over the ranks. peak: most "
        f"that a rank held beyond what it had before, while it loaded the head and ran it once."
    )
    oversubscribed = [record for record in records if record.oversubscribed]
    if oversubscribed:
        caption += f" OVERSUBSCRIBED at {_ranks_on(oversubscribed)}; bytes are exact all the same."
    table = _table("Memory and agreement", caption)
    _columns(table, "weights MB/rank", "over share %", "peak MB/rank")
    _columns(table, "top-1 %", "worst source %")
    first: dict[tuple[str, int], Record] = {}
    for record in records:
        first.setdefault((record.head, record.tp_size), record)
    whole = {head: r.weight_bytes_per_rank for (head, tp_size), r in first.items() if tp_size == 1}
    _rows(
        table,
        list(first.values()),
        lambda r: (
            _megabytes(r.weight_bytes_per_rank),
            _over_share(r, whole.get(r.head)),
            _megabytes(r.peak_bytes_per_rank),
            _percent(r.top1_agreement, 2),
            _worst(r),
        ),
    )
    return table


def _table(title: str, caption: str) -> Table:
    table = Table(
        title=title, caption=caption, caption_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
    )
    table.add_column("tp", justify="right", no_wrap=True)
    table.add_column("head", no_wrap=True)
    return table


def _columns(table: Table, *names: str) -> None:
    for name in names:
        table.add_column(name, justify="right")


def _rows(table: Table, records: Sequence[Record], cells: _Cells) -> None:
    sizes = sorted({record.tp_size for record in records})
    for tp_size in sizes:
        for record in records:
            if record.tp_size == tp_size:
                table.add_row(str(tp_size), record.head, *cells(record))
        table.add_section()


def _setting(records: Sequence[Record]) -> str:
    first = records[0]
    model = f"{first.model} (SYNTHETIC)" if first.synthetic else first.model
    threads = f"{first.threads_per_rank} thread{'' if first.threads_per_rank == 1 else 's'} a rank"
    numbers = sorted({record.num_iterations for record in records})
    iterations = str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
    uncertain = "; ~: bursts differ by more than the count" if any(map(_uncertain, records)) else ""
    return (
        f"{first.system}: {first.device}; {first.backend}; {first.dtype}; {threads}; {model}; "
        f"{iterations} iterations a head; x dense: speed over dense_local_max at the same tp; "
        f"eff.: of scaling from tp 1{uncertain}"
    )


def _ranks_on(records: Iterable[Record]) -> str:
    by_size = {record.tp_size: record.oversubscription for record in records}
    return ", ".join(by_size[tp_size] for tp_size in sorted(by_size))


def _bytes_cells(record: Record) -> tuple[str, str, str]:
    return (
        f"{record.payload_bytes_per_row:,.0f}",
        f"{record.sent_bytes_per_row:,.0f}",
        _counted(record),
    )


def _counted(record: Record) -> str:
    counted = record.counted_bytes_per_row
    if counted is None:
        return UNKNOWN
    return f"{'~' if _uncertain(record) else ''}{counted:,.0f}"


def _uncertain(record: Record) -> bool:
    """Whether single bursts of counted bytes differ by more than the count itself."""
    counted = record.counted_bytes_per_row
    least, greatest = record.counted_bytes_per_row_least, record.counted_bytes_per_row_greatest
    if counted is None or least is None or greatest is None:
        return False
    return greatest - least > max(counted, 1.0)


def _us(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:,.0f}"


def _times(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.2f}"


def _percent(value: float | None, digits: int) -> str:
    return UNKNOWN if value is None else f"{100 * value:.{digits}f}"


def _megabytes(value: int | None) -> str:
    return UNKNOWN if value is None else f"{value / 1e6:,.1f}"


def _over_share(record: Record, whole: int | None) -> str:
    """How far the largest rank's weights exceed what the head holds at tp 1, over the ranks."""
    if not whole:
        return UNKNOWN
    return f"{100 * (record.weight_bytes_per_rank * record.tp_size / whole - 1):+.1f}"


def _worst(record: Record) -> str:
    if record.top1_agreement_worst_source is None:
        return UNKNOWN
    worst = _percent(record.top1_agreement_worst_source, 1)
    return f"{worst} ({record.worst_source}, {record.num_worst_source_states})"
