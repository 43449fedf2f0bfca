"""Figures of a head by source of the texts, each with a 95 % confidence interval."""

from __future__ import annotations

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
from flashhead_dist.hidden_states import HiddenStates

BLOCK = 64
ALL = "all"
SHARES = ("top1_agreement", "top10_containment")
"""Figures whose interval is at least Wilson's over the states; see `intervals`."""
DENSE_LOG_PROB, HEAD_LOG_PROB = "dense_log_prob", "head_log_prob"
PERPLEXITIES = ("dense_perplexity", "perplexity", "perplexity_ratio")


def clusters_of(hidden_states: HiddenStates) -> tuple[Array, str]:
    """What is drawn as one in the bootstrap: a number int `[N]` for each state, and what it is.

    The document where documents are known, or else runs of 64 states of a source.
    """
    sources = hidden_states.source_ids.numpy()
    if hidden_states.documents is not None:
        documents = hidden_states.documents.numpy()
        numbers: Array = sources * (int(documents.max(initial=0)) + 1) + documents
        return numbers, "documents"
    numbers = np.zeros(len(sources), dtype=np.int64)
    for source in np.unique(sources):
        own = np.flatnonzero(sources == source)
        numbers[own] = source * len(sources) + blocks_of(len(own), BLOCK)
    return numbers, f"blocks of {BLOCK} states"


def figures_by_source(
    figures: Mapping[str, Tensor], hidden_states: HiddenStates, *, seed: int = 0
) -> pd.DataFrame:
    """A row a source, and last one for all states: mean figures with `_low` and `_high` limits.

    figures: a number float64 `[N]` of each state by name. `dense_log_prob` and `head_log_prob`
    become perplexities, and their ratio (head over dense) by paired samples. `clusters` counts what
    was drawn as one.
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
        found = percentile_interval(float(means[place]), samples[:, place])
        if name in SHARES:
            found = found.widened(wilson(float(values[:, place].sum()), len(values)))
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
            row |= _named(name, percentile_interval(float(np.exp(mean)), np.exp(drawn)))
    return row


def _named(name: str, interval: Interval) -> dict[str, float]:
    return {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}
