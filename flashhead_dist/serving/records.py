"""Records of the serving benchmark, one line of JSON a call of the client, and their summary."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pandas as pd

from flashhead_dist.bench.records import cannot_write
from flashhead_dist.errors import UserError
from flashhead_dist.serving.bench import DENSE, FLASHHEAD, HEADS, Served

SERVING_NAME = "serving.jsonl"
SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class ServingRecord(Served):
    """One head at one `tp_size` and concurrency, in one round.

    number: of the round, from 0. new_tokens: of every request.
    """

    schema_version: int
    time_utc: str
    head: str
    tp_size: int
    concurrency: int
    number: int
    num_requests: int
    new_tokens: int
    oversubscribed: bool

    system: str
    device: str
    dtype: str
    model: str
    model_hash: str
    index_hash: str
    versions: dict[str, str]
    commit: str


def append_record(record: ServingRecord, folder: Path) -> None:
    """Add a line to the run folder's file and flush it to the disk.

    Raises:
        UserError: the file cannot be written.
    """
    path = folder / SERVING_NAME
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(record), ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise cannot_write(path, error) from error


def read_serving(folder: Path) -> list[ServingRecord]:
    """The records of a run folder, in the order of measurement.

    A last line without its newline, which a killed run leaves, is skipped.

    Raises:
        UserError: no such file, or a line that is no record of this schema.
    """
    path = folder / SERVING_NAME
    try:
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    except OSError as error:
        raise UserError(
            f"cannot read {path} ({error.strerror or error}): give a run folder that "
            f"launch/serve_bench.py wrote"
        ) from error
    known = {field.name for field in fields(ServingRecord)}
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            value: Any = json.loads(line)
            if value["schema_version"] != SCHEMA_VERSION:
                raise ValueError(
                    f"its schema is {value['schema_version']}, of commit {value.get('commit')}, "
                    f"and this reads {SCHEMA_VERSION}"
                )
            if wrong := known ^ value.keys():
                raise ValueError(f"keys missing or unknown: {', '.join(sorted(wrong))}")
            records.append(ServingRecord(**value))
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"line {number} of {path} is not a record ({error}): remove it or measure again"
            ) from error
    return records


def summarise(records: Sequence[ServingRecord]) -> pd.DataFrame:
    """One row per `tp_size`, concurrency and head; None where a figure is unknown.

    tokens_per_s, and p10 and p90 of it: over rounds. ttft_* and tpot_*: the median over rounds of
    the client's percentiles over requests. over_dense: ratio of median tokens a second.
    identical_texts: share of requests whose text is the dense server's of the same round.
    same_start: mean share of the dense text before the first difference. dense_repeats: share of
    requests for which the dense server repeated the text of its first call at the lowest
    concurrency: how reproducible greedy decoding of one server is. flashhead_steps: share of the
    head's steps that FlashHead took, by its own counters.
    """
    rows = []
    ordered = sorted(records, key=lambda r: (r.tp_size, r.concurrency, HEADS.index(r.head)))
    for (tp_size, concurrency), cell in groupby(ordered, lambda r: (r.tp_size, r.concurrency)):
        by_head = {head: list(own) for head, own in groupby(cell, lambda r: r.head)}
        dense = by_head.get(DENSE, [])
        for head, own in by_head.items():
            row: dict[str, Any] = {"tp_size": tp_size, "concurrency": concurrency, "head": head}
            p10, p50, p90 = np.quantile([r.tokens_per_s for r in own], [0.1, 0.5, 0.9]).tolist()
            row |= {"tokens_per_s": p50, "tokens_per_s_p10": p10, "tokens_per_s_p90": p90}
            for name in ("ttft", "tpot"):
                for p in ("p50", "p99"):
                    row[f"{name}_{p}_ms"] = median(getattr(r, f"{name}_ms")[p] for r in own)
            row["over_dense"] = p50 / median(r.tokens_per_s for r in dense) if dense else None
            row |= {"identical_texts": None, "same_start": None}
            references = {r.number: r.texts for r in dense} if head != DENSE else {}
            pairs = [(r.texts, references[r.number]) for r in own if r.number in references]
            if pairs:
                row["identical_texts"], row["same_start"] = np.mean(
                    [agreement(*pair) for pair in pairs], axis=0
                ).tolist()
            row["dense_repeats"] = _repeats(dense, records) if head == DENSE else None
            row["flashhead_steps"] = _steps_share(own) if head == FLASHHEAD else None
            rows.append(row | {"rounds": len(own), "requests": own[0].num_requests})
    return pd.DataFrame(rows)


def agreement(texts: Sequence[str], references: Sequence[str]) -> tuple[float, float]:
    """Share of texts equal to their references, and the mean share before a difference."""
    pairs = list(zip(texts, references, strict=True))
    starts = [_common_start(*pair) / max(1, len(pair[1])) for pair in pairs]
    return float(np.mean([text == other for text, other in pairs])), float(np.mean(starts))


def _common_start(text: str, other: str) -> int:
    pairs = enumerate(zip(text, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(text), len(other)))


def _repeats(dense: Sequence[ServingRecord], records: Sequence[ServingRecord]) -> float | None:
    """Against the dense server's first call of the lowest concurrency at this `tp_size`."""
    same_size = [r for r in records if r.head == DENSE and r.tp_size == dense[0].tp_size]
    first = min(same_size, key=lambda r: (r.concurrency, r.number))
    shares = []
    for record in dense:
        if record is not first:
            count = min(len(first.texts), len(record.texts))
            shares.append(agreement(record.texts[:count], first.texts[:count])[0])
    return float(np.mean(shares)) if shares else None


def _steps_share(own: Sequence[ServingRecord]) -> float | None:
    steps = {
        head: sum(r.counters.get(f'vllm:flashhead_steps_total{{head="{head}"}}', 0.0) for r in own)
        for head in HEADS
    }
    total = sum(steps.values())
    return steps[FLASHHEAD] / total if total else None
