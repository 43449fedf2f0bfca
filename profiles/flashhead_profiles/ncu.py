"""Counters of kernels as Nsight Compute prints them, read into a pandas frame.

The text is that of `ncu --import REPORT --csv --page raw --print-units base`: a row of names, a row
of units, then a row a kernel. Metrics and columns as the Nsight Compute CLI documents them
(https://docs.nvidia.com/nsight-compute/NsightComputeCli/): "ID" (kernels in the order in which they
were profiled), "Kernel Name", gpu__time_duration.sum (nanoseconds in base units),
dram__bytes_read.sum, dram__bytes_write.sum, and lts__t_sector_hit_rate.pct. Columns are read by
their names, whatever stands between them, and rows are sorted by ID. No text printed by a real
`ncu` was at hand to try this on.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd

from flashhead_profiles.timeline import TraceError

COLUMNS = (
    "kernel",
    "rank",
    "time_us",
    "dram_read_bytes",
    "dram_written_bytes",
    "l2_hit_rate",
    "achieved_bytes_per_s",
)
_METRICS = {
    "time_us": "gpu__time_duration.sum",
    "dram_read_bytes": "dram__bytes_read.sum",
    "dram_written_bytes": "dram__bytes_write.sum",
    "l2_hit_rate": "lts__t_sector_hit_rate.pct",
}
_FACTORS = {
    "time_us": {"ns": 1e-3, "nsecond": 1e-3, "us": 1.0, "usecond": 1.0},
    "dram_read_bytes": {"byte": 1.0},
    "dram_written_bytes": {"byte": 1.0},
    "l2_hit_rate": {"%": 0.01},
}
_RANK_IN_NAME = re.compile(r"rank_?(\d+)")


def read_ncu(path: Path, rank: int | None = None) -> pd.DataFrame:
    """One row a profiled kernel: times, bytes, share of L2 sectors that hit, bytes a second.

    A metric that was not collected is NaN, and `frame.attrs["missing"]` says so.
    rank: where the file's name does not hold it as `rank0`.

    Raises:
        TraceError: the file cannot be read, is not such a table, or has a unit that is not known.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(f"cannot read {path} ({error}): give a text that ncu printed") from error
    # ncu may say something before the table.
    first = next((i for i, line in enumerate(lines) if '"Kernel Name"' in line), None)
    if first is None:
        raise TraceError(
            f"{path} holds no table of kernels: make it with ncu --import REPORT --csv --page raw "
            f"--print-units base"
        )
    table = pd.read_csv(path, skiprows=first, dtype=str, keep_default_na=False)
    if len(table) < 2:
        raise TraceError(f"{path} holds no kernel: none of a head's ran inside a capture")
    units, rows = table.iloc[0], table.iloc[1:]
    if "ID" in rows:
        order = pd.to_numeric(rows["ID"], errors="coerce").argsort(kind="stable")
        rows = rows.iloc[order.to_numpy()]
    if rank is None:
        named = _RANK_IN_NAME.search(path.name)
        rank = int(named[1]) if named else 0
    frame = pd.DataFrame({"kernel": rows["Kernel Name"].to_list(), "rank": rank})
    missing: dict[str, str] = {}
    for column, metric in _METRICS.items():
        if metric not in table.columns:
            frame[column] = np.nan
            missing[column] = f"ncu did not collect {metric}"
            continue
        factor = _FACTORS[column].get(units[metric])
        if factor is None:
            raise TraceError(
                f"{path} gives {metric} in {units[metric]!r}: print it with --print-units base"
            )
        numbers = pd.to_numeric(rows[metric].str.replace(",", ""), errors="coerce")
        frame[column] = numbers.to_numpy() * factor
    moved = frame["dram_read_bytes"] + frame["dram_written_bytes"]
    frame["achieved_bytes_per_s"] = moved / (frame["time_us"] * 1e-6)
    frame.attrs["missing"] = missing
    return frame[list(COLUMNS)]
