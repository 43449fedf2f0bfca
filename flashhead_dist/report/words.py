"""A run in a few plain sentences, each of which names what it compares."""

from __future__ import annotations

from collections.abc import Sequence

from flashhead_dist.bench.records import Record
from flashhead_dist.heads.dense import DenseGather
from flashhead_dist.heads.registry import BASELINE, DEFAULT_HEAD

_PRODUCT, _BASELINE = DEFAULT_HEAD, BASELINE


def summary_sentences(records: Sequence[Record]) -> list[str]:
    """Sentences about the smallest batch size: speed, scaling, bytes, agreement, what is missing.

    A sentence appears only where the records hold what it compares.
    """
    if not records:
        return ["Nothing was measured."]
    batch_size = min(record.batch_size for record in records)
    batch = [record for record in records if record.batch_size == batch_size]
    return [
        *_setting(records),
        *_speed(batch, batch_size),
        *_scaling(batch, batch_size),
        *_bytes(batch),
        *_agreement(batch),
    ]


def _setting(records: Sequence[Record]) -> list[str]:
    sentences = []
    if records[0].synthetic:
        sentences.append(f"The model is SYNTHETIC ({records[0].model}): no claim about fidelity.")
    over = {r.tp_size: r.oversubscription for r in records if r.oversubscribed}
    if over:
        sizes = ", ".join(str(size) for size in sorted(over))
        sentences.append(
            f"OVERSUBSCRIBED at tp {sizes} ({over[max(over)]}): figures there are projected from "
            f"each rank's compute measured alone, and nothing about speed there was measured."
        )
    return sentences


def _speed(batch: Sequence[Record], batch_size: int) -> list[str]:
    sentences = []
    for tp_size in sorted({record.tp_size for record in batch}):
        product = _find(batch, _PRODUCT, tp_size)
        baseline = _find(batch, _BASELINE, tp_size)
        if product is None or baseline is None:
            continue
        speedup = product.speedup_over_dense_local_max
        if speedup is None or product.median_us is None or baseline.median_us is None:
            continue
        verb = "takes" if product.measured else "is PROJECTED to take"
        sentences.append(
            f"At batch {batch_size} and tp {tp_size}, {_PRODUCT} {verb} {product.median_us:,.0f} "
            f"us a step where {_BASELINE} {verb} {baseline.median_us:,.0f} us: {speedup:.1f} times "
            f"as fast."
        )
    return sentences


def _scaling(batch: Sequence[Record], batch_size: int) -> list[str]:
    sentences = []
    for name in (_BASELINE, _PRODUCT):
        known = [
            record
            for record in batch
            if record.head == name and record.scaling_efficiency is not None and record.tp_size > 1
        ]
        if known:
            points = ", ".join(
                f"{100 * (record.scaling_efficiency or 0):.0f} % at tp {record.tp_size}"
                f"{'' if record.measured else ' (projected)'}"
                for record in sorted(known, key=lambda record: record.tp_size)
            )
            sentences.append(f"Scaling efficiency of {name} at batch {batch_size}: {points}.")
    return sentences


def _bytes(batch: Sequence[Record]) -> list[str]:
    tp_size = max(record.tp_size for record in batch)
    if tp_size == 1:
        return []
    parts = []
    for name in (_PRODUCT, DenseGather.name):
        record = _find(batch, name, tp_size)
        if record is None:
            continue
        counted = record.counted_bytes_per_row
        seen = (
            f"not counted: {record.counted_reason}"
            if counted is None
            else f"{counted:,.0f} bytes sent a rank and row as the interface counted them"
        )
        parts.append(f"{name} {record.payload_bytes_per_row:,.0f} bytes a row ({seen})")
    if not parts:
        return []
    return [
        f"Payload of one greedy step at tp {tp_size}: {'; '.join(parts)}. Below about 1 KB the "
        f"count is mostly protocol."
    ]


def _agreement(batch: Sequence[Record]) -> list[str]:
    found = [r for r in batch if r.head == _PRODUCT and r.top1_agreement is not None]
    if not found:
        return []
    worst = min(found, key=lambda record: record.top1_agreement or 0.0)
    overall = 100 * (worst.top1_agreement or 0.0)
    source = 100 * (worst.top1_agreement_worst_source or 0.0)
    sizes = sorted({record.tp_size for record in found})
    same = len({record.top1_agreement for record in found}) == 1
    where = (
        f"at every tp_size measured ({', '.join(str(size) for size in sizes)})"
        if same
        else f"at its worst tp_size, {worst.tp_size}"
    )
    return [
        f"{_PRODUCT} gives the dense head's token on {overall:.2f} % of "
        f"{worst.num_agreement_states:,} test states {where}, and on {source:.2f} % in the worst "
        f"source ({worst.worst_source}, {worst.num_worst_source_states} states; "
        "launch/evaluate.py takes all there are)."
    ]


def _find(records: Sequence[Record], head: str, tp_size: int) -> Record | None:
    for record in records:
        if record.head == head and record.tp_size == tp_size:
            return record
    return None
