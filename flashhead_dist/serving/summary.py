"""From records to figures: one row a head, `tp_size` and concurrency."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from statistics import median
from typing import Any

import numpy as np
import pandas as pd

from flashhead_dist.serving.records import DENSE, FLASHHEAD, HEADS, ServingRecord

KEYS = ("tp_size", "concurrency", "head")
_STEPS = "vllm:flashhead_steps_total"


def summarise(records: Sequence[ServingRecord]) -> pd.DataFrame:
    """One row a cell, by `tp_size`, concurrency and head.

    tokens_per_s, and p10 and p90 of it: over rounds. ttft_* and tpot_*: the median over rounds of
    the client's percentiles over requests. over_dense: ratio of median tokens a second.
    identical_texts: share of requests whose text is the dense server's of the same round.
    same_start: mean share of the dense text before the first difference. dense_repeats: share of
    requests for which the dense server wrote what it wrote for them in its first call at the lowest
    concurrency: what greedy decoding of one and the same server is worth. flashhead_steps: share of
    the head's steps that FlashHead took, by its own counters. None where a figure is not known.
    """
    ordered = sorted(records, key=lambda r: (r.tp_size, r.concurrency, HEADS.index(r.head)))
    rows = []
    for (tp_size, concurrency), cell in groupby(ordered, lambda r: (r.tp_size, r.concurrency)):
        by_head = {head: list(found) for head, found in groupby(cell, lambda r: r.head)}
        dense = by_head.get(DENSE, [])
        for head, own in by_head.items():
            row: dict[str, Any] = {"tp_size": tp_size, "concurrency": concurrency, "head": head}
            row |= _speed(own)
            row["over_dense"] = (
                row["tokens_per_s"] / median(r.tokens_per_s for r in dense) if dense else None
            )
            row |= _agreement(own, dense if head != DENSE else [])
            row["dense_repeats"] = _repeats(dense, records) if head == DENSE else None
            row["flashhead_steps"] = _steps_share(own) if head == FLASHHEAD else None
            rows.append(row | {"rounds": len(own), "requests": own[0].num_requests})
    return pd.DataFrame(rows)


def agreement(texts: Sequence[str], reference: Sequence[str]) -> tuple[float, float]:
    """Share of texts that are the reference's, and the mean share of it before a difference."""
    same = [ours == theirs for ours, theirs in zip(texts, reference, strict=True)]
    starts = [
        _common_start(ours, theirs) / max(1, len(theirs))
        for ours, theirs in zip(texts, reference, strict=True)
    ]
    return float(np.mean(same)), float(np.mean(starts))


def _speed(own: Sequence[ServingRecord]) -> dict[str, float]:
    rates = [record.tokens_per_s for record in own]
    p10, p50, p90 = np.quantile(rates, [0.1, 0.5, 0.9])
    row = {"tokens_per_s": float(p50), "tokens_per_s_p10": float(p10)}
    row["tokens_per_s_p90"] = float(p90)
    for name in ("ttft_ms", "tpot_ms"):
        for percentile in ("p50", "p99"):
            values = [getattr(record, name)[percentile] for record in own]
            row[f"{name.removesuffix('_ms')}_{percentile}_ms"] = median(values)
    return row


def _agreement(
    own: Sequence[ServingRecord], dense: Sequence[ServingRecord]
) -> dict[str, float | None]:
    theirs = {record.number: record.texts for record in dense}
    found = [agreement(r.texts, theirs[r.number]) for r in own if r.number in theirs]
    if not found:
        return {"identical_texts": None, "same_start": None}
    same, starts = (float(np.mean(values)) for values in zip(*found, strict=True))
    return {"identical_texts": same, "same_start": starts}


def _repeats(dense: Sequence[ServingRecord], records: Sequence[ServingRecord]) -> float | None:
    """Against the dense server's first call of the least concurrency at this `tp_size`."""
    same_size = [r for r in records if r.head == DENSE and r.tp_size == dense[0].tp_size]
    first = min(same_size, key=lambda r: (r.concurrency, r.number))
    others = [r for r in dense if r is not first]
    if not others:
        return None
    shares = []
    for record in others:
        number = min(len(first.texts), len(record.texts))
        shares.append(agreement(record.texts[:number], first.texts[:number])[0])
    return float(np.mean(shares))


def _steps_share(own: Sequence[ServingRecord]) -> float | None:
    by_head = {
        head: sum(r.counters.get(f'{_STEPS}{{head="{head}"}}', 0.0) for r in own) for head in HEADS
    }
    total = sum(by_head.values())
    return by_head[FLASHHEAD] / total if total else None


def _common_start(ours: str, theirs: str) -> int:
    for place, (one, other) in enumerate(zip(ours, theirs, strict=False)):
        if one != other:
            return place
    return min(len(ours), len(theirs))
