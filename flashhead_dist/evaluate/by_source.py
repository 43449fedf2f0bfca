"""Figures of a head by source of the texts, each with a 95 % confidence interval."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from flashhead_dist.evaluate.intervals import (
    Array,
    Interval,
    blocks_of,
    cluster_means,
    percentile_interval,
    wilson,
)
from flashhead_dist.states import HiddenStates

BLOCK = 64
ALL = "all"
SHARES = ("top1_agreement", "top10_containment")
"""Figures whose interval is at least Wilson's over the states; see `intervals`."""
DENSE_LOG_PROB, HEAD_LOG_PROB = "dense_log_prob", "head_log_prob"
PERPLEXITIES = ("dense_perplexity", "perplexity", "perplexity_ratio")


def clusters_of(hidden_states: HiddenStates) -> tuple[Array, str]:
    """What is drawn as one in the bootstrap: a number int `[N]` for each state, and what it is.

    The document, or runs of 64 states of a source where documents are unknown, or the source has
    only one: a single document would give an interval without width.
    """
    sources = hidden_states.source_ids.numpy()
    documents = hidden_states.documents
    known = np.zeros(len(sources), np.int64) if documents is None else documents.numpy()
    numbers = np.zeros(len(sources), dtype=np.int64)
    single = False
    for source in np.unique(sources):
        own = np.flatnonzero(sources == source)
        _, parts = np.unique(known[own], return_inverse=True)
        if parts.max(initial=0) == 0:
            parts, single = blocks_of(len(own), BLOCK), True
        numbers[own] = source * len(sources) + parts
    if documents is None:
        return numbers, f"blocks of {BLOCK} states"
    return numbers, "documents" + (f" (blocks of {BLOCK} states where one)" if single else "")


def figures_by_source(
    figures: Mapping[str, Tensor], hidden_states: HiddenStates, *, seed: int = 0
) -> pd.DataFrame:
    """A row a source, and last one for all states: mean figures with `_low` and `_high` limits.

    figures: a number float64 `[N]` of each state by name. `dense_log_prob` and `head_log_prob`
    become perplexities, and their ratio (head over dense) by paired samples. `clusters` counts what
    was drawn as one; limits are NaN where that is 1, but for SHARES.
    """
    names = list(figures)
    values = torch.stack([figures[name].double() for name in names], dim=1).numpy()
    clusters, _ = clusters_of(hidden_states)
    sources = hidden_states.source_ids.numpy()
    rows = []
    for number, source in enumerate(hidden_states.sources):
        own = sources == number
        if own.any():
            strata = np.zeros(int(own.sum()), dtype=np.int64)
            rows.append(_row(source, names, values[own], clusters[own], strata, seed))
    rows.append(_row(ALL, names, values, clusters, sources, seed))
    return pd.DataFrame(rows)


def _row(
    source: str, names: list[str], values: Array, clusters: Array, strata: Array, seed: int
) -> dict[str, Any]:
    samples = cluster_means(values, clusters, strata, seed=seed)
    means = values.mean(0)
    row: dict[str, Any] = {
        "source": source, "states": len(values), "clusters": len(np.unique(clusters)),
    }  # fmt: skip
    for place, name in enumerate(names):
        if name in (DENSE_LOG_PROB, HEAD_LOG_PROB):
            continue
        found = _interval(float(means[place]), samples[:, place], row["clusters"])
        if name in SHARES:
            least = wilson(float(values[:, place].sum()), len(values))
            found = least if row["clusters"] < 2 else found.widened(least)
        row |= _named(name, found)
    if DENSE_LOG_PROB in names:
        dense, head = names.index(DENSE_LOG_PROB), names.index(HEAD_LOG_PROB)
        logs = {
            "dense_perplexity": (-means[dense], -samples[:, dense]),
            "perplexity": (-means[head], -samples[:, head]),
            "perplexity_ratio": (
                means[dense] - means[head],
                samples[:, dense] - samples[:, head],
            ),
        }
        for name, (mean, drawn) in logs.items():
            row |= _named(name, _interval(float(np.exp(mean)), np.exp(drawn), row["clusters"]))
    return row


def _interval(value: float, samples: Array, clusters: int) -> Interval:
    """By the samples; unknown (NaN) where there is only one cluster to draw."""
    if clusters < 2:
        return Interval(value, math.nan, math.nan)
    return percentile_interval(value, samples)


def _named(name: str, interval: Interval) -> dict[str, float]:
    return {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}
