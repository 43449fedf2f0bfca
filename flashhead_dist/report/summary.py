"""Records as a table of pandas, with measured and projected latencies in columns of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pandas as pd

from flashhead_dist.bench.records import Record, cannot_write

SUMMARY_NAME = "summary.csv"

_ONLY_WHEN_MEASURED = (
    "median_us",
    "p10_us",
    "p90_us",
    "communication_us",
    "speedup_over_dense_local_max",
    "scaling_efficiency",
)
_COLUMNS = (
    "head",
    "tp_size",
    "batch_size",
    "measured",
    "oversubscribed",
    *(f"measured_{name}" for name in _ONLY_WHEN_MEASURED),
    "projected_median_us",
    "projected_communication_us",
    "projected_speedup_over_dense_local_max",
    "projected_scaling_efficiency",
    "compute_us",
    "wall_median_us",
    "payload_bytes_per_row",
    "sent_bytes_per_row",
    "counted_bytes_per_row",
    "weight_bytes_per_rank",
    "peak_bytes_per_rank",
    "workspace_bytes_per_rank",
    "top1_agreement",
    "top1_agreement_worst_source",
    "worst_source",
    "num_worst_source_states",
    "num_agreement_states",
    "num_iterations",
    "system",
    "model",
    "dtype",
    "commit",
    "model_hash",
    "index_hash",
    "seed",
)


def summary_frame(records: Sequence[Record]) -> pd.DataFrame:
    """One row a record, sorted by batch size, `tp_size` and the order of the heads in `records`."""
    rows = []
    for record in records:
        row = asdict(record)
        kind = "measured" if record.measured else "projected"
        row.update({f"{kind}_{name}": row[name] for name in _ONLY_WHEN_MEASURED})
        rows.append(row)
    frame = pd.DataFrame(rows).reindex(columns=list(_COLUMNS))
    return frame.sort_values(["batch_size", "tp_size"], kind="stable").reset_index(drop=True)


def write_summary(records: Sequence[Record], folder: Path) -> Path:
    """Write `summary.csv` into the run folder; raises UserError where that fails."""
    path = folder / SUMMARY_NAME
    try:
        summary_frame(records).to_csv(path, index=False)
    except OSError as error:
        raise cannot_write(path, error) from error
    return path
