"""How figures are named and rounded on the page.

CSV files hold them under their own names, whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

MISSING = "–"


@dataclass(frozen=True)
class Column:
    """A heading with its unit, and how a figure under it is written."""

    heading: str
    write: Callable[[float], str]


def _us(value: float) -> str:
    if value == 0:
        return "0"
    return f"{value:,.0f}" if abs(value) >= 10 else f"{value:.1f}"


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _times(value: float) -> str:
    return f"{value:.2f}"


def _percent(value: float) -> str:
    return f"{100 * value:.0f}" if abs(value) >= 0.1 else f"{100 * value:.1f}"


def _fine_percent(value: float) -> str:
    return f"{100 * value:.2f}"


def _signed_percent(value: float) -> str:
    return f"{100 * value:+.1f}"


def _megabytes(value: float) -> str:
    return f"{value / 1e6:,.1f}"


def _tenth(value: float) -> str:
    return f"{value:,.1f}"


def _gb_per_s(value: float) -> str:
    return f"{value / 1e9:,.1f}"


_COLUMNS = {
    "head": Column("head", str),
    "tp_size": Column("tp", str),
    "pp_size": Column("pp", str),
    "batch_size": Column("batch", str),
    "rank": Column("rank", str),
    "median_us": Column("median µs", _us),
    "p10_us": Column("p10", _us),
    "p90_us": Column("p90", _us),
    "compute_us": Column("compute µs", _us),
    "communication_us": Column("comm. µs", _us),
    "wall_median_us": Column("wall µs", _us),
    "speedup_over_dense_local_max": Column("× dense", _times),
    "num_iterations": Column("iterations", _count),
    "speedup": Column("speedup", _times),
    "speedup_p10": Column("p10", _times),
    "speedup_p90": Column("p90", _times),
    "scaling_efficiency": Column("efficiency %", _percent),
    "payload_bytes_per_row": Column("payload B/row", _count),
    "sent_bytes_per_row": Column("sent B/row (analytic)", _count),
    "counted_bytes_per_row": Column("counted B/row", _count),
    "counted_bytes_per_row_least": Column("least", _count),
    "counted_bytes_per_row_greatest": Column("greatest", _count),
    "protocol_bytes_per_row": Column("counted − sent, B/row", _count),
    "counted_over_sent": Column("counted / sent", lambda value: f"{value:.3f}"),
    "message_bytes": Column("B a message", _count),
    "weight_bytes_per_rank": Column("weights MB/rank", _megabytes),
    "even_share_bytes": Column("even share MB", _megabytes),
    "over_even_share": Column("over share %", _signed_percent),
    "peak_bytes_per_rank": Column("peak MB/rank", _megabytes),
    "workspace_bytes_per_rank": Column("workspace MB/rank", _megabytes),
    "top1_agreement": Column("top-1 %", _fine_percent),
    "top1_agreement_low": Column("95 % low", _fine_percent),
    "top1_agreement_high": Column("high", _fine_percent),
    "num_agreement_states": Column("states", _count),
    "top1_agreement_worst_source": Column("worst source %", _fine_percent),
    "worst_source": Column("worst source", str),
    "num_worst_source_states": Column("its states", _count),
    "retrieval_us": Column("retrieval µs", _us),
    "scan_us": Column("scan µs", _us),
    "scan_over_retrieval": Column("scan / retrieval", _times),
    "micro_batches": Column("micro-batches", _count),
    "schedule": Column("schedule", str),
    "tokens_per_s": Column("tokens/s", _tenth),
    "tokens_per_s_p10": Column("p10", _tenth),
    "tokens_per_s_p90": Column("p90", _tenth),
    "concurrency": Column("concurrency", str),
    "ttft_p50_ms": Column("TTFT ms, p50", _tenth),
    "ttft_p99_ms": Column("p99", _tenth),
    "tpot_p50_ms": Column("TPOT ms, p50", _tenth),
    "tpot_p99_ms": Column("p99", _tenth),
    "over_dense": Column("× dense", _times),
    "identical_texts": Column("same texts %", _percent),
    "same_start": Column("same start %", _percent),
    "dense_repeats": Column("dense repeats itself %", _percent),
    "flashhead_steps": Column("FlashHead's steps %", _fine_percent),
    "rounds": Column("rounds", _count),
    "requests": Column("requests", _count),
    "measured_bubble": Column("bubble %", _percent),
    "formula_bubble": Column("equal stages, formula %", _percent),
    "ideal_bubble": Column("these stages, free messages %", _percent),
    "step_us": Column("step µs", _us),
    "centroids_us": Column("centroids µs", _us),
    "candidates_us": Column("candidates µs", _us),
    "other_us": Column("other µs", _us),
    "exchange_us": Column("exchange µs", _us),
    "exchange_p10_us": Column("p10", _us),
    "exchange_p90_us": Column("p90", _us),
    "waiting_us": Column("waiting µs", _us),
    "read_bytes": Column("read MB", _megabytes),
    "read_bytes_per_s": Column("read GB/s", _gb_per_s),
    "memory_bandwidth_bytes_per_s": Column("memory GB/s", _gb_per_s),
    "roofline_share": Column("share %", _percent),
    "counter": Column("counter", str),
    "counted_bytes_per_step": Column("counted B/step", _count),
    "analytic_bytes_per_step": Column("analytic B/step", _count),
    "number": Column("number", _count),
    "duration_us": Column("median µs", _us),
    "kernels_us": Column("kernels µs", _us),
    "overlap_us": Column("overlap µs", _us),
    "time_us": Column("µs", _us),
    "dram_read_bytes": Column("DRAM read MB", _megabytes),
    "dram_written_bytes": Column("DRAM written MB", _megabytes),
    "l2_hit_rate": Column("L2 hits %", _percent),
    "achieved_bytes_per_s": Column("GB/s", _gb_per_s),
    "over_median_rank": Column("× median rank", _times),
    "system": Column("system", str),
    "low_us": Column("band from", _us),
    "high_us": Column("to", _us),
    "sent_bytes": Column("sent B", _count),
    "carried_by": Column("carried by", str),
    "before": Column("before", lambda value: f"{value:,.6g}"),
    "after": Column("after", lambda value: f"{value:,.6g}"),
    "change": Column("change %", _signed_percent),
    "noise": Column("noise ± %", _percent),
    "figure": Column("figure", str),
    "verdict": Column("beyond noise?", str),
    "run": Column("run", str),
}
_KINDS = ("measured_", "projected_")


def column_of(name: str) -> Column:
    """Heading and form of a frame's column; `measured_` and `projected_` in front are dropped."""
    if name in _COLUMNS:
        return _COLUMNS[name]
    for kind in _KINDS:
        if name.startswith(kind):
            return column_of(name.removeprefix(kind))
    return Column(name.replace("_", " "), lambda value: f"{value}")
