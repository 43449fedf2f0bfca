"""What decoding took, as a table, as sentences, and as one JSON document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from flashhead_dist.decode.compare import (
    Measured,
    against_dense,
    identical_share,
    middle,
    p90,
)
from flashhead_dist.decode.engine import Traffic
from flashhead_dist.integrations.pipeline_bubble import measured_bubble


def generation_table(measured: Sequence[Measured]) -> Table:
    """A line a variant; times are of batches, over prompts."""
    dense = against_dense(measured)
    table = Table(title="Decoding: measured", title_justify="left")
    columns = ("head", "TPOT ms", "p90", "x dense", "TTFT ms", "p90", "tokens/s")
    for column in (*columns, "head %", "check %", "same tokens %"):
        table.add_column(column, justify="left" if column == "head" else "right")
    for item in measured:
        ratio = same = "-"
        if dense is not None:
            ratio = f"{middle(dense.tpot_s) / middle(item.tpot_s):.2f}"
            same = f"{100 * identical_share(item.tokens, dense.tokens):.2f}"
        table.add_row(
            item.variant.label,
            f"{middle(item.tpot_s) * 1e3:.1f}",
            f"{p90(item.tpot_s) * 1e3:.1f}",
            ratio,
            f"{middle(item.ttft_s) * 1e3:.1f}",
            f"{p90(item.ttft_s) * 1e3:.1f}",
            f"{item.tokens_per_s:.1f}",
            f"{100 * item.head_s / item.run_s:.0f}",
            f"{100 * item.check_s / item.run_s:.0f}" if item.variant.check_every else "-",
            same,
        )
    return table


def generation_notes(measured: Sequence[Measured], traffic: Mapping[str, Traffic]) -> list[str]:
    """Sentences under the table: what was checked, and what crossed the wire."""
    notes = []
    for item in measured:
        if item.variant.check_every:
            counts = item.counts
            notes.append(
                f"{item.variant.label}: {counts.checks} dense checks confirmed "
                f"{counts.confirmed:,} tokens, put another in the place of {counts.corrected}, and "
                f"took back {counts.discarded} in {counts.rollbacks} rollbacks."
            )
        if item.stages:
            bubbles = [measured_bubble(stages) for stages in item.stages]
            notes.append(
                f"{item.variant.label}: stages were idle {100 * middle(bubbles):.0f} % of the time "
                f"(median over runs; launch/bench_pipeline.py sets that against theory)."
            )
    for label, found in traffic.items():
        notes.append(
            f"{label}: {found.head_bytes_per_token:,.0f} bytes a token from the head's collectives "
            f"and {found.body_bytes_per_token:,.0f} from the body's, by DeepSpeed's communication "
            f"log."
        )
    return notes


def generation_document(
    measured: Sequence[Measured],
    texts: Mapping[str, list[str]],
    traffic: Mapping[str, Traffic],
) -> dict[str, Any]:
    """What --json prints: every figure by the variant's label; times in ms; None for no figure."""
    dense = against_dense(measured)

    def by_label(figure: Any) -> dict[str, Any]:
        found = {item.variant.label: figure(item) for item in measured}
        # JSON knows no NaN.
        return {label: None if value != value else value for label, value in found.items()}

    document: dict[str, Any] = {
        "tpot_ms": by_label(lambda item: middle(item.tpot_s) * 1e3),
        "tpot_p90_ms": by_label(lambda item: p90(item.tpot_s) * 1e3),
        "ttft_ms": by_label(lambda item: middle(item.ttft_s) * 1e3),
        "ttft_p90_ms": by_label(lambda item: p90(item.ttft_s) * 1e3),
        "tokens_per_s": by_label(lambda item: item.tokens_per_s),
        "head_share": by_label(lambda item: item.head_s / item.run_s),
        "check_share": by_label(lambda item: item.check_s / item.run_s),
        "checks": {item.variant.label: vars(item.counts) for item in measured},
        "num_tokens": by_label(lambda item: item.num_tokens),
        "finish_reasons": {item.variant.label: item.reasons for item in measured},
        "bytes_per_token": {label: asdict(found) for label, found in traffic.items()},
        "texts": dict(texts),
    }
    if dense is not None:
        document["tpot_ratio"] = by_label(lambda item: middle(dense.tpot_s) / middle(item.tpot_s))
        document["identical_tokens_share"] = by_label(
            lambda item: identical_share(item.tokens, dense.tokens)
        )
    return document
