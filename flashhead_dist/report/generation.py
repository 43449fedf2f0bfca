"""Decoding for people: text while it is decoded, then a table, sentences and a JSON document."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pandas as pd
import torch
from rich.table import Table

from flashhead_dist.decode.compare import Measured, against_dense, identical_share, middle, p90
from flashhead_dist.decode.engine import Traffic
from flashhead_dist.decode.sequences import DecodeState
from flashhead_dist.integrations.pipeline_bubble import measured_bubble
from flashhead_dist.report.tables import rich_table

_COLUMNS = [
    "head", "tpot_ms", "tpot_p90_ms", "tpot_ratio", "ttft_ms", "ttft_p90_ms", "tokens_per_s",
    "head_share", "check_share", "identical_tokens_share"
]  # fmt: skip


def generation_table(measured: Sequence[Measured]) -> Table:
    """A line a variant; times are of batches, over prompts."""
    document = generation_document(measured, {}, {})
    figures = {key: document[key] for key in _COLUMNS[1:] if key in document}
    frame = pd.DataFrame(figures).rename_axis("head").reset_index()
    frame["head"] = [item.variant.label for item in measured]
    checked = pd.Series([bool(item.variant.check_every) for item in measured])
    return rich_table(
        "Decoding: measured",
        frame.assign(check_share=frame["check_share"].where(checked)).reindex(columns=_COLUMNS),
    )


def generation_notes(measured: Sequence[Measured], traffic: Mapping[str, Traffic]) -> list[str]:
    """Sentences under the table: what was checked, and what crossed the wire."""
    notes = []
    for item in measured:
        if item.variant.check_every:
            counts = item.counts
            notes.append(
                f"{item.variant.label}: {counts.checks} dense checks confirmed "
                f"{counts.confirmed:,} tokens, replaced {counts.corrected}, and discarded "
                f"{counts.discarded} in {counts.rollbacks} rollbacks."
            )
        if item.stages:
            idle = middle([measured_bubble(stages) for stages in item.stages])
            notes.append(
                f"{item.variant.label}: stages were idle {100 * idle:.0f} % of the time (median "
                f"over runs; launch/bench_pipeline.py compares that with theory)."
            )
    for label, found in traffic.items():
        notes.append(
            f"{label}: {found.head_bytes_per_token:,.0f} bytes a token from the head's collectives "
            f"and {found.body_bytes_per_token:,.0f} from the body's, by DeepSpeed's communication "
            f"log."
        )
    return notes


def generation_document(
    measured: Sequence[Measured], texts: Mapping[str, list[str]], traffic: Mapping[str, Traffic]
) -> dict[str, Any]:
    """What --json prints: every figure by the variant's label; times in ms; None for no figure."""
    dense = against_dense(measured)

    def by_label(figure: Callable[[Measured], float]) -> dict[str, float | None]:
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


def stream_text(
    tokenizer: Any, prompts: Sequence[str], states: Sequence[DecodeState], first_prompt: int
) -> Callable[[int], None]:
    """What to call with the number of a state that may have released tokens.

    A single sequence is written as it comes, with transformers' streamer, which holds back what may
    still change (half a word, half a character). Of several each is written when it has ended.
    """

    def heading(number: int) -> None:
        if len(prompts) > 1:
            start = " ".join(prompts[number].split())[:60]
            sys.stdout.write(f"\n=== prompt {number + 1}: {start}\n")

    if len(states) == 1 and states[0].batch_size == 1:
        from transformers import TextStreamer

        heading(first_prompt)
        streamer: Any = TextStreamer(tokenizer, skip_special_tokens=True)

        def write(number: int) -> None:
            state = states[number]
            for token in state.released(0):
                streamer.put(torch.tensor([token]))
            if state.done:
                streamer.end()

        return write

    ended: set[int] = set()

    def write_ended(number: int) -> None:
        state = states[number]
        first = first_prompt + sum(before.batch_size for before in states[:number])
        for row in range(state.batch_size):
            prompt = first + row
            unfinished = state.finish_reason(row) is None or bool(state.unconfirmed)
            if prompt in ended or (unfinished and not state.done):
                continue
            ended.add(prompt)
            heading(prompt)
            sys.stdout.write(tokenizer.decode(state.tokens(row), skip_special_tokens=True) + "\n")
            sys.stdout.flush()

    return write_ended
