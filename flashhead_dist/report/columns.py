"""Every column of every table of the project, declared once.

A column of a table, a CSV file, the page or docs/reference/columns.md is one entry of `COLUMNS`. To
add one to a table of records, declare it here: its key is a field of a record or it has a `value`,
and `tables` names the tables. Frames that are made elsewhere show any key that they have.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

MISSING = "–"
KINDS = ("measured", "projected")
_SCALES = {"%": 100.0, "MB": 1e-6, "GB/s": 1e-9}


@dataclass(frozen=True)
class Column:
    """A key with its heading, unit, format and meaning.

    format: of Python, for the figure in `unit`; empty for text. tables: of records, by the stem of
    their CSV file. value: computes the column from a frame of records, where no field holds it.
    by_kind: measured and projected figures are `measured_KEY` and `projected_KEY`.
    """

    key: str
    heading: str
    unit: str
    format: str
    meaning: str
    tables: tuple[str, ...] = ()
    value: Callable[[pd.DataFrame], pd.Series | np.ndarray] | None = None
    by_kind: bool = False

    @property
    def title(self) -> str:
        """Heading and unit."""
        return f"{self.heading} {self.unit}".strip()

    def write(self, value: object) -> str:
        """A cell: the figure in the column's unit, or a dash where it is unknown."""
        if value is None or pd.isna(value):  # type: ignore[call-overload]
            return MISSING
        if not self.format:
            return str(value)
        number = float(value) * _SCALES.get(self.unit, 1.0)  # type: ignore[arg-type]
        digits = ",.1f" if self.unit == "µs" and 0 < abs(number) < 10 else self.format
        return format(number, digits)


def at_tp_1(frame: pd.DataFrame, key: str) -> np.ndarray:
    """For each row, `key` of the same head and batch size on one rank; NaN where unknown."""
    single = frame[frame["tp_size"] == 1].set_index(["head", "batch_size"])[key]
    rows = pd.MultiIndex.from_frame(frame[["head", "batch_size"]])
    return single.reindex(rows).to_numpy(dtype=float)


def wilson_interval(share: Any, number: Any) -> tuple[Any, Any]:
    """95 % interval of a share of `number` trials.

    Wilson, J. Am. Stat. Assoc. 22 (1927) 209: unlike the usual one it holds near 0 and 1.
    """
    z = 1.959964
    middle = (share + z**2 / (2 * number)) / (1 + z**2 / number)
    half = z * np.sqrt(share * (1 - share) / number + z**2 / (4 * number**2))
    half = half / (1 + z**2 / number)
    return np.maximum(0.0, middle - half), np.minimum(1.0, middle + half)


def _wilson(frame: pd.DataFrame, end: int) -> pd.Series:
    number = frame["num_agreement_states"].replace(0, np.nan)
    interval: pd.Series = wilson_interval(frame["top1_agreement"], number)[end]
    return interval


_CELL = ("summary", "latency", "scaling", "split", "wire", "roofline")
_SIZE = ("fidelity", "memory")
_SUM = ("summary",)
_US, _COUNT, _TIMES, _TENTH = ",.0f", ",.0f", ".2f", ",.1f"
_DECLARED = (
    # What a row is about.
    Column("run", "run", "", "", "Letter of the run; A is the first given."),
    Column("fact", "fact", "", "", "What was measured on what."),
    Column("figure", "figure", "", "", "Which figure of two runs is compared."),
    Column("system", "system", "", "", "Class of the machine, or system projected to.", _SUM),
    Column("batch_size", "batch", "", ".0f", "Rows of hidden states in a step.", _CELL),
    Column("tp_size", "tp", "", ".0f", "Ranks that share the head.", (*_CELL, *_SIZE)),
    Column("pp_size", "pp", "", ".0f", "Stages of the pipeline."),
    Column("head", "head", "", "", "Output head, by the name of --heads.", (*_CELL, *_SIZE)),
    Column("rank", "rank", "", ".0f", "Rank within the tensor-parallel group."),
    Column("capture", "capture", "", "", "Which capture of a profile."),
    Column("range", "range", "", "", "Named range of a profile."),
    Column("kernel", "kernel", "", "", "Name of a GPU kernel."),
    Column("schedule", "schedule", "", "", "Continuous: no step waits for the whole batch."),
    Column("level", "level", "", "", "Level of the hardware topology."),
    Column("operation", "operation", "", "", "Collective operation."),
    Column("counter", "counter", "", "", "Counter of the GPU, by NVML."),
    Column("carried_by", "carried by", "", "", "What carries the exchange."),
    Column("concurrency", "concurrency", "", ".0f", "Requests in flight at once."),
    Column("measured", "measured", "", "", "False where latencies are projected.", _SUM),
    Column("oversubscribed", "oversubscribed", "", "", "More ranks than cores.", _SUM),
    # Latency.
    Column("median_us", "median", "µs", _US, "A step of the slowest rank, median over iterations.",
           ("summary", "latency"), by_kind=True),
    Column("p10_us", "p10", "µs", _US, "10th percentile of a step over iterations.", ("summary",
           "latency"), by_kind=True),
    Column("p90_us", "p90", "µs", _US, "90th percentile of a step over iterations.", ("summary",
           "latency"), by_kind=True),
    Column("communication_us", "communication", "µs", _US,
           "The step without compute: exchange and waiting.", ("summary", "latency"), by_kind=True),
    Column("speedup_over_dense_local_max", "× dense", "", _TIMES,
           "Speed over dense_local_max at the same tp and batch size.", ("summary", "latency"),
           by_kind=True),
    Column("scaling_efficiency", "efficiency", "%", ".0f",
           "t(1) / (P t(P)): speedup over tp 1, divided by the ranks.", ("summary", "scaling"),
           by_kind=True),
    Column("compute_us", "compute", "µs", _US, "Compute of the slowest rank, median.", ("summary",
           "latency")),
    Column("wall_median_us", "wall", "µs", _US,
           "Clock time of a step; where ranks share cores they take turns, so it is no latency.",
           ("summary", "latency")),
    Column("num_iterations", "iterations", "", _COUNT, "Timed iterations.", ("summary",
           "latency")),
    Column("speedup", "speedup", "×", _TIMES, "t(1) / t(P) of the same head and batch size.",
           ("scaling",), lambda f: at_tp_1(f, "median_us") / f["median_us"], by_kind=True),
    Column("speedup_p10", "p10", "×", _TIMES, "Speedup if the step took its 90th percentile.",
           ("scaling",), lambda f: at_tp_1(f, "median_us") / f["p90_us"], by_kind=True),
    Column("speedup_p90", "p90", "×", _TIMES, "Speedup if the step took its 10th percentile.",
           ("scaling",), lambda f: at_tp_1(f, "median_us") / f["p10_us"], by_kind=True),
    # Parts of a step along the rank that computes longest.
    Column("step_us", "step", "µs", _US, "The step in the rounds with ranges.", ("split",)),
    Column("centroids_us", "centroids", "µs", _US, "Scores and choice of clusters.", ("split",)),
    Column("candidates_us", "candidates", "µs", _US, "Rows that are scored exactly.", ("split",)),
    Column("other_us", "other", "µs", _US, "All other compute.", ("split",)),
    Column("exchange_us", "exchange", "µs", _US, "The exchange without waiting.", ("split",)),
    Column("exchange_p10_us", "p10", "µs", _US, "10th percentile of the exchange.", ("split",)),
    Column("exchange_p90_us", "p90", "µs", _US, "90th percentile of the exchange.", ("split",)),
    Column("waiting_us", "waiting", "µs", _US, "Longest wait of another rank for the slowest one.",
           ("split",), by_kind=True),
    Column("over_median_rank", "× median rank", "", _TIMES, "Compute over the ranks' median."),
    # Bytes on the wire.
    Column("payload_bytes_per_row", "payload", "B/row", _COUNT,
           "Bytes of one rank's result for one row.", ("summary", "wire")),
    Column("sent_bytes_per_row", "sent", "B/row", _COUNT,
           "Analytic: what a ring makes one rank send for one row.", ("summary", "wire")),
    Column("counted_bytes_per_row", "counted", "B/row", _COUNT,
           "Counted by the network interface, for one rank and row.", ("summary", "wire")),
    Column("counted_bytes_per_row_least", "least", "B/row", _COUNT,
           "Least count over bursts of steps.", ("wire",)),
    Column("counted_bytes_per_row_greatest", "greatest", "B/row", _COUNT,
           "Greatest count over bursts of steps.", ("wire",)),
    Column("protocol_bytes_per_row", "counted − sent", "B/row", _COUNT,
           "Bytes of the protocol: counted less sent.", ("wire",),
           lambda f: f["counted_bytes_per_row"] - f["sent_bytes_per_row"]),
    Column("counted_over_sent", "counted / sent", "", ".3f", "Counted over analytic bytes.",
           ("wire",), lambda f: f["counted_bytes_per_row"].replace(0, np.nan) /
           f["sent_bytes_per_row"].replace(0, np.nan)),
    Column("sent_bytes", "sent", "B", _COUNT, "Bytes that a rank sends in a step."),
    Column("message_bytes", "message", "B", _COUNT, "Bytes of one message between stages."),
    Column("payload_bytes", "size", "B", _COUNT, "Size of a collective as nccl-tests defines it."),
    Column("counted_bytes_per_step", "counted", "B/step", _COUNT, "Counted by the GPUs, a step."),
    Column("analytic_bytes_per_step", "analytic", "B/step", _COUNT, "What a step should move."),
    # Memory and its bandwidth.
    Column("weight_bytes_per_rank", "weights", "MB", _TENTH,
           "Weights of the head on the rank that holds most.", ("summary", "memory")),
    Column("even_share_bytes", "even share", "MB", _TENTH, "Weights at tp 1 over tp.", ("memory",),
           lambda f: at_tp_1(f, "weight_bytes_per_rank") / f["tp_size"]),
    Column("over_even_share", "imbalance", "%", "+.1f",
           "Weights of the fullest rank beyond an even share.", ("memory",), lambda f:
           f["weight_bytes_per_rank"] * f["tp_size"] / at_tp_1(f, "weight_bytes_per_rank") - 1),
    Column("peak_bytes_per_rank", "peak", "MB", _TENTH,
           "Most that a rank allocated while it loaded the head and ran it once.",
           ("summary", "memory")),
    Column("workspace_bytes_per_rank", "workspace", "MB", _TENTH,
           "Most that a step allocates beyond weights; in `memory` over all batch sizes.",
           ("summary", "memory")),
    Column("read_bytes", "read", "MB", _TENTH, "Bytes that a step must read.", ("roofline",)),
    Column("read_bytes_per_s", "read", "GB/s", _TENTH,
           "Bytes that a step must read over its compute.", ("roofline",),
           lambda f: f["read_bytes"] / (f["compute_of_rank_us"] * 1e-6)),
    Column("memory_bandwidth_bytes_per_s", "memory", "GB/s", _TENTH,
           "What a plain read by the same ranks reached.", ("roofline",)),
    Column("roofline_share", "share of bandwidth", "%", ".0f",
           "Read GB/s over memory GB/s; above 100 % some bytes came from a cache.", ("roofline",)),
    # Agreement with the dense head.
    Column("top1_agreement", "recall@1", "%", ".2f",
           "Share of test states for which the head returns the dense argmax.",
           ("summary", "fidelity")),
    Column("top1_agreement_low", "95 % from", "%", ".2f", "Lower end of the Wilson interval.",
           ("fidelity",), lambda f: _wilson(f, 0)),
    Column("top1_agreement_high", "to", "%", ".2f", "Upper end of the Wilson interval.",
           ("fidelity",), lambda f: _wilson(f, 1)),
    Column("num_agreement_states", "states", "", _COUNT, "Test states.", ("summary", "fidelity")),
    Column("top1_agreement_worst_source", "worst source", "%", ".2f",
           "Recall@1 in the source of texts where it is least.", ("summary", "fidelity")),
    Column("worst_source", "source", "", "", "Which source that is.", ("summary", "fidelity")),
    Column("num_worst_source_states", "its states", "", _COUNT, "Test states of that source.",
           ("summary", "fidelity")),
    # Where a record comes from.
    Column("model", "model", "", "", "Model that was measured.", _SUM),
    Column("dtype", "dtype", "", "", "Type of the weights.", _SUM),
    Column("commit", "commit", "", "", "Commit of the code.", _SUM),
    Column("model_hash", "model hash", "", "", "SHA-256 of the head's weights.", _SUM),
    Column("index_hash", "index hash", "", "", "SHA-256 of the index.", _SUM),
    Column("seed", "seed", "", ".0f", "Seed of the run.", _SUM),
    # Batch crossover.
    Column("retrieval_us", "retrieval", "µs", _US, "Compute of a step with retrieval."),
    Column("scan_us", "scan", "µs", _US, "Compute of a scan of the index's rows."),
    Column("scan_over_retrieval", "scan / retrieval", "", _TIMES, "Scan over retrieval."),
    # Pipeline.
    Column("micro_batches", "micro-batches", "", _COUNT, "Micro-batches in flight."),
    Column("tokens_per_s", "tokens/s", "", _TENTH, "Tokens a second of all sequences."),
    Column("tokens_per_s_p10", "p10", "", _TENTH, "10th percentile over rounds."),
    Column("tokens_per_s_p90", "p90", "", _TENTH, "90th percentile over rounds."),
    Column("measured_bubble", "idle", "%", ".0f", "Mean share of time that a stage is idle."),
    Column("formula_bubble", "idle, equal stages", "%", ".0f", "(p - 1) / (m + p - 1)."),
    Column("ideal_bubble", "idle, free messages", "%", ".0f",
           "Measured compute of the stages, replayed with messages that take no time."),
    # Serving.
    Column("ttft_p50_ms", "TTFT p50", "ms", _TENTH, "Time to the first token, median request."),
    Column("ttft_p99_ms", "p99", "ms", _TENTH, "Time to the first token, 99th percentile."),
    Column("tpot_p50_ms", "TPOT p50", "ms", _TENTH, "Time a further token, median request."),
    Column("tpot_p99_ms", "p99", "ms", _TENTH, "Time a further token, 99th percentile."),
    Column("over_dense", "× dense", "", _TIMES, "Tokens a second over the dense server's."),
    Column("identical_texts", "same texts", "%", ".0f",
           "Requests whose text is the dense server's of the same round."),
    Column("same_start", "same start", "%", ".0f",
           "Mean share of the dense server's text before the first difference."),
    Column("dense_repeats", "dense repeats", "%", ".0f",
           "Texts of the dense server that equal its first call's at the lowest concurrency."),
    Column("flashhead_steps", "FlashHead's steps", "%", ".2f", "Steps that FlashHead computed."),
    Column("rounds", "rounds", "", _COUNT, "Rounds of the benchmark."),
    Column("requests", "requests", "", _COUNT, "Requests of a round."),
    # Generation and tasks.
    Column("tpot_ms", "TPOT", "ms", _TENTH, "Time a further token, median over batches."),
    Column("tpot_p90_ms", "p90", "ms", _TENTH, "90th percentile of it."),
    Column("ttft_ms", "TTFT", "ms", _TENTH, "Time to the first token, median over batches."),
    Column("ttft_p90_ms", "p90", "ms", _TENTH, "90th percentile of it."),
    Column("tpot_ratio", "× dense", "", _TIMES, "Dense head's TPOT over this head's."),
    Column("head_share", "head", "%", ".0f", "Share of the run that the head takes."),
    Column("check_share", "check", "%", ".0f", "Share of the run that dense checks take."),
    Column("identical_tokens_share", "same tokens", "%", ".2f", "Tokens equal to the dense ones."),
    # Profiles.
    Column("number", "number", "", _COUNT, "How many were recorded."),
    Column("duration_us", "median", "µs", _US, "Median duration of the range."),
    Column("kernels_us", "kernels", "µs", _US, "Kernels launched in the range."),
    Column("overlap_us", "overlap", "µs", _US, "Communication that compute overlaps."),
    Column("time_us", "time", "µs", _US, "Median duration of the kernel."),
    Column("dram_read_bytes", "DRAM read", "MB", _TENTH, "Bytes read from the GPU's memory."),
    Column("dram_written_bytes", "DRAM written", "MB", _TENTH, "Bytes written to it."),
    Column("l2_hit_rate", "L2 hits", "%", ".0f", "Share of accesses that the L2 cache served."),
    Column("achieved_bytes_per_s", "achieved", "GB/s", _TENTH, "DRAM bytes over the time."),
    # Calibration.
    Column("fitted_us", "fitted", "µs", _TENTH, "What the fitted link predicts."),
    Column("relative_error", "error", "%", "+.1f", "Fitted over measured, less one."),
    # Projection, and comparison of runs.
    Column("low_us", "band from", "µs", _US, "Step, if the model errs as it did on average."),
    Column("high_us", "to", "µs", _US, "The same, if it errs the other way."),
    Column("before", "before", "", ",.6g", "The figure in the first run."),
    Column("after", "after", "", ",.6g", "The figure in the later run."),
    Column("change", "change", "%", "+.1f", "After over before, less one."),
    Column("noise", "noise ±", "%", ".0f", "Change that iterations of one run scatter by."),
    Column("verdict", "beyond noise?", "", "", "Better, worse, within noise, or same."),
    Column("counted_reason", "why not counted", "", "", "Why bytes were not counted.", ("wire",)),
)  # fmt: skip
COLUMNS: dict[str, Column] = {column.key: column for column in _DECLARED}


def column_of(key: str) -> Column:
    """The declaration of a frame's key, with or without `measured_` or `projected_` in front."""
    if key in COLUMNS:
        return COLUMNS[key]
    kind, _, rest = key.partition("_")
    if kind in KINDS:
        return column_of(rest)
    return Column(key, key.replace("_", " "), "", "", "")


def table_keys(table: str) -> list[str]:
    """Keys of a table of records, in the order of declaration."""
    keys: list[str] = []
    for column in COLUMNS.values():
        if table in column.tables:
            kinds = [f"{kind}_{column.key}" for kind in KINDS]
            keys += kinds if column.by_kind else [column.key]
    return keys


def glossary() -> str:
    """docs/reference/columns.md: every column with its key, unit, tables and meaning."""
    lines = [
        "# Columns",
        "",
        "Every column of the terminal's tables, of the report and of its CSV files. Made",
        "with `python -m flashhead_dist.report.columns`. CSV files hold unrounded figures in base",
        "units (`_us`, `_bytes`, shares of 1); keys marked with * are in files as",
        "`measured_KEY` and `projected_KEY`.",
        "",
        "| key | heading | tables of records | meaning |",
        "|---|---|---|---|",
    ]
    for column in COLUMNS.values():
        key = f"`{column.key}`{'*' if column.by_kind else ''}"
        tables = ", ".join(column.tables)
        lines.append(f"| {key} | {column.title} | {tables} | {column.meaning} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(glossary(), end="")
