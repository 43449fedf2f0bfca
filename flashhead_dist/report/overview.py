"""A run in short: one table, what each further rank saves, and sentences.

The terminal and the head of the page show the same table: a row a head, a column a `tp_size`.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import pandas as pd

from flashhead_dist.heads.registry import BASELINE, DEFAULT_HEAD
from flashhead_dist.report.columns import MISSING, column_of

BOUND_BY_MEMORY = 0.75
"""From this share of a plain read's bandwidth on, memory is said to limit a head."""


def short_table(frame: pd.DataFrame, batch_size: int) -> pd.DataFrame:
    """Microseconds a step and times the dense head: a row a head, a column a `tp_size`.

    frame: of records. A column of projected figures says so in its heading.
    """
    batch = frame[frame["batch_size"] == batch_size]
    median, times = column_of("median_us"), column_of("speedup_over_dense_local_max")
    cells = batch.assign(
        cell=[
            median.write(us) if pd.isna(share) else f"{median.write(us)} ({share:.1f}×)"
            for us, share in zip(batch["median_us"], batch[times.key], strict=True)
        ],
        size=[
            f"tp {tp_size}{'' if measured else ' (PROJECTED)'}"
            for tp_size, measured in zip(batch["tp_size"], batch["measured"], strict=True)
        ],
    )
    cells.loc[cells["median_us"].isna(), "cell"] = MISSING
    table = cells.pivot(index="head", columns="size", values="cell").fillna(MISSING)
    order = list(dict.fromkeys(cells["head"])), list(dict.fromkeys(cells["size"]))
    return table.loc[order[0], order[1]].rename_axis(columns=None).reset_index()


def rank_steps(frame: pd.DataFrame, head: str, batch_size: int) -> pd.DataFrame:
    """What each larger `tp_size` changes: a row from each size with a known step to the next.

    saved_us: by how much compute falls. added_us: by how much the rest of the step (exchange and
    waiting) grows. within_noise: p10 to p90 of the two measured steps overlap.
    """
    own = frame[(frame["head"] == head) & (frame["batch_size"] == batch_size)]
    own = own[own["median_us"].notna()].sort_values("tp_size")
    before = own.shift()
    saved_us = before["compute_us"] - own["compute_us"]
    measured = own["measured"] & before["measured"].eq(True)
    overlap = (own["p10_us"] <= before["p90_us"]) & (before["p10_us"] <= own["p90_us"])
    steps = pd.DataFrame(
        {
            "before": before["tp_size"],
            "after": own["tp_size"],
            "before_us": before["median_us"],
            "after_us": own["median_us"],
            "saved_us": saved_us,
            "added_us": saved_us - (before["median_us"] - own["median_us"]),
            "projected": ~measured,
            "within_noise": measured & overlap,
        }
    )
    return steps[1:].astype({"before": int}).reset_index(drop=True)


def best_size(frame: pd.DataFrame, head: str, batch_size: int) -> int | None:
    """The smallest `tp_size` with the shortest step; None where no step is known."""
    own = frame[(frame["head"] == head) & (frame["batch_size"] == batch_size)]
    own = own[own["median_us"].notna()].sort_values("tp_size")
    return None if own.empty else int(own.sort_values(["median_us", "tp_size"])["tp_size"].iloc[0])


def sentences(frame: pd.DataFrame, batch_size: int, head: str = DEFAULT_HEAD) -> list[str]:
    """What limits a head at a batch size, and from how many ranks on more gain nothing."""
    own = frame[(frame["head"] == head) & (frame["batch_size"] == batch_size)]
    own = own[own["median_us"].notna()].sort_values("tp_size")
    if own.empty:
        return [f"{head} was not measured at batch {batch_size}."]
    return [
        *(_speed(own, batch_size) if head != BASELINE else []),
        *_limit(own[own["tp_size"] == 1]),
        *_ranks(frame, head, batch_size),
        *_agreement(own),
    ]


def _speed(own: pd.DataFrame, batch_size: int) -> list[str]:
    known = own[own["speedup_over_dense_local_max"].notna()]
    parts = [
        f"{row['speedup_over_dense_local_max']:.1f} times as fast at tp {row['tp_size']}"
        f"{'' if row['measured'] else ' (PROJECTED)'}"
        for row in known.to_dict("records")
    ]
    if not parts:
        return []
    return [f"Against {BASELINE}, {own['head'].iloc[0]} at batch {batch_size} is {_list(parts)}."]


def _limit(single: pd.DataFrame) -> list[str]:
    """What one rank's compute is bound by, from its share of the memory's bandwidth."""
    return [
        f"On one rank {row['head']} reads {row['read_bytes'] / 1e6:,.1f} MB a step at "
        f"{row['read_bytes_per_s'] / 1e9:,.1f} GB/s, {100 * row['roofline_share']:.0f} % of what a "
        f"plain read reaches: memory bandwidth "
        f"{'limits it' if row['roofline_share'] >= BOUND_BY_MEMORY else 'alone does not limit it'}."
        for row in single.to_dict("records")
    ]


def _ranks(frame: pd.DataFrame, head: str, batch_size: int) -> list[str]:
    steps = rank_steps(frame, head, batch_size)
    if steps.empty:
        return []
    parts = [
        f"from tp {row['before']} to {row['after']} compute falls by {row['saved_us']:,.0f} µs and "
        f"exchange and waiting add {row['added_us']:,.0f} µs{_kind(row)}"
        for row in steps.to_dict("records")
    ]
    text = _list(parts)
    best = best_size(frame, head, batch_size)
    is_measured = frame.loc[frame["tp_size"] == best, "measured"].all()
    shortest = f"The step of {head} is shortest at tp {best}{'' if is_measured else ' (PROJECTED)'}"
    after = steps[steps["before"] == best].to_dict("records")
    if not after:
        return [f"{text[0].upper()}{text[1:]}.", f"{shortest}, the most ranks of this run."]
    reason = (
        "compute does not fall"
        if after[0]["saved_us"] <= 0
        else "exchange and waiting cost more than the compute that they save"
    )
    end = f"at tp {after[0]['after']} {reason}{_kind(after[0])}"
    return [f"{text[0].upper()}{text[1:]}.", f"{shortest}; {end}."]


def _kind(row: Mapping[Hashable, Any]) -> str:
    if row["projected"]:
        return " (PROJECTED)"
    return " (within noise)" if row["within_noise"] else ""


def _agreement(own: pd.DataFrame) -> list[str]:
    known = own[own["top1_agreement"].notna()]
    if known.empty:
        return []
    worst = known.sort_values("top1_agreement", kind="stable").iloc[0]
    where = (
        "at every tp size"
        if known["top1_agreement"].nunique() == 1
        else f"at tp {worst['tp_size']}, the worst"
    )
    source = (
        ""
        if pd.isna(worst["top1_agreement_worst_source"])
        else f", {100 * worst['top1_agreement_worst_source']:.1f} % in the worst source of texts "
        f"({worst['worst_source']}, {worst['num_worst_source_states']:.0f} states)"
    )
    return [
        f"{worst['head']} returns the dense head's token for {100 * worst['top1_agreement']:.2f} % "
        f"of {worst['num_agreement_states']:,} test states {where}{source}."
    ]


def _list(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
