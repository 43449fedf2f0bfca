"""Confidence intervals for samples in clusters, and figures of a head by source with intervals.

Hidden states of one document are correlated, so bootstrap samples draw documents: a cluster
bootstrap (Davison and Hinkley, Bootstrap Methods and their Application, 1997, section 3.8) with
percentile limits. With few documents its intervals are too narrow, and where no state differs the
width is zero. A share's interval is therefore at least Wilson's over the states (Wilson, JASA 22,
1927), which has a width even at 0 and 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from flashhead_dist.states import HiddenStates

Array = np.ndarray[Any, np.dtype[Any]]

LEVEL = 0.95
DRAWS = 2000
BLOCK = 64
"""States that are drawn together where documents are unknown."""
ALL = "all"
SHARES = ("top1_agreement", "top10_containment")
"""Figures whose interval is at least Wilson's over the states."""
DENSE_LOG_PROB, HEAD_LOG_PROB = "dense_log_prob", "head_log_prob"
_MOST_WEIGHTS = 1 << 22
"""Of one block of draws: 32 MiB."""


@dataclass(frozen=True)
class Interval:
    """A figure with the limits of its 95 % confidence interval."""

    value: float
    low: float
    high: float

    def widened(self, other: Interval) -> Interval:
        """The same figure, with limits that enclose both intervals."""
        return Interval(self.value, min(self.low, other.low), max(self.high, other.high))


def wilson(successes: float, count: int) -> Interval:
    """Wilson's score interval of a share, for independent trials.

    Raises:
        ValueError: no trial.
    """
    if count < 1:
        raise ValueError("a share needs at least one trial")
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    share = successes / count
    scale = 1 + z * z / count
    middle = (share + z * z / (2 * count)) / scale
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / scale
    # Rounding must not put a share of 0 or 1 outside its own interval.
    return Interval(share, min(share, middle - half), max(share, middle + half))


def cluster_means(values: Array, clusters: Array, strata: Array, *, seed: int = 0) -> Array:
    """Means of `values [N, m]` over all states, in bootstrap samples of clusters: `[DRAWS, m]`.

    clusters, strata: int `[N]`; a cluster lies in one stratum, and each stratum keeps its number of
    clusters in every sample. A column is a figure; rows of the result go together, so that the
    interval of a difference or a ratio of figures is of paired samples.
    """
    _, members = np.unique(clusters, return_inverse=True)
    size = int(members.max()) + 1
    sums = np.zeros((size, values.shape[1]))
    np.add.at(sums, members, values)
    counts = np.bincount(members, minlength=size).astype(float)
    stratum = np.zeros(size, dtype=np.int64)
    stratum[members] = strata
    draw = np.random.default_rng(seed)
    total, weight = np.zeros((DRAWS, values.shape[1])), np.zeros(DRAWS)
    for number in np.unique(stratum):
        own = np.flatnonzero(stratum == number)
        block = max(1, _MOST_WEIGHTS // len(own))
        for start in range(0, DRAWS, block):
            part = slice(start, min(start + block, DRAWS))
            shape = part.stop - part.start
            drawn = draw.multinomial(len(own), np.full(len(own), 1 / len(own)), size=shape)
            total[part] += drawn @ sums[own]
            weight[part] += drawn @ counts[own]
    means: Array = total / weight[:, None]
    return means


def percentile_interval(value: float, samples: Array) -> Interval:
    """`value` with the percentiles of its bootstrap `samples [DRAWS]` as limits."""
    low, high = np.quantile(samples, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high))


def bootstrap_median(values: Array, *, seed: int = 0) -> Interval:
    """The median of independent `values [n]`, inf allowed (censored above), n at least 1.

    Limits are percentiles that are values themselves, so that inf is not averaged with a number.
    """
    ordered = np.sort(np.asarray(values, dtype=float))
    draw = np.random.default_rng(seed)
    places = np.sort(draw.integers(len(ordered), size=(DRAWS, len(ordered))), axis=1)
    medians = np.sort(ordered[places[:, (len(ordered) - 1) // 2]])
    low, high = (medians[round(q * (DRAWS - 1))] for q in ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return Interval(float(ordered[(len(ordered) - 1) // 2]), float(low), float(high))


def clusters_of(hidden_states: HiddenStates) -> tuple[Array, str]:
    """Clusters of the bootstrap: the number int `[N]` of each state's, and what a cluster is.

    A cluster is a document; where documents are unknown or a source has only one, which would give
    an interval without width, it is a run of BLOCK states of a source.
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
            parts, single = np.arange(len(own)) // BLOCK, True
        numbers[own] = source * len(sources) + parts
    if documents is None:
        return numbers, f"blocks of {BLOCK} states"
    return numbers, "documents" + (f" (blocks of {BLOCK} states where one)" if single else "")


def figures_by_source(
    figures: Mapping[str, Tensor], hidden_states: HiddenStates, *, seed: int = 0
) -> pd.DataFrame:
    """One row per source, all states last: mean figures with `_low` and `_high` limits.

    figures: by name, a float64 `[N]` with the figure of each state. `dense_log_prob` and
    `head_log_prob` become perplexities and their ratio (head over dense) by paired samples.
    `clusters` counts clusters; with one cluster, limits are NaN except for SHARES.
    """
    values = pd.DataFrame({name: figure.double().numpy() for name, figure in figures.items()})
    clusters, _ = clusters_of(hidden_states)
    sources = hidden_states.source_ids.numpy()
    rows = []
    for number, source in [*enumerate(hidden_states.sources), (None, ALL)]:
        own = np.full(len(sources), True) if number is None else sources == number
        if own.any():
            row = _row(values[own], clusters[own], sources[own], seed)
            rows.append({"source": source, "states": int(own.sum())} | row)
    return pd.DataFrame(rows)


def _row(values: pd.DataFrame, clusters: Array, strata: Array, seed: int) -> dict[str, Any]:
    table = np.ascontiguousarray(values)
    num_clusters = len(np.unique(clusters))
    means = pd.Series(table.mean(0), values.columns)
    samples = pd.DataFrame(cluster_means(table, clusters, strata, seed=seed), columns=means.index)
    found: dict[str, Interval] = {}
    for name in means.index.drop([DENSE_LOG_PROB, HEAD_LOG_PROB], errors="ignore"):
        found[name] = _interval(means[name], samples[name], num_clusters)
        if name in SHARES:
            least = wilson(float(values[name].sum()), len(values))
            found[name] = least if num_clusters < 2 else found[name].widened(least)
    if DENSE_LOG_PROB in means:
        for data in (means, samples):
            data["dense_perplexity"] = np.exp(-data[DENSE_LOG_PROB])
            data["perplexity"] = np.exp(-data[HEAD_LOG_PROB])
            data["perplexity_ratio"] = np.exp(data[DENSE_LOG_PROB] - data[HEAD_LOG_PROB])
        for name in ("dense_perplexity", "perplexity", "perplexity_ratio"):
            found[name] = _interval(means[name], samples[name], num_clusters)
    row: dict[str, Any] = {"clusters": num_clusters}
    for name, interval in found.items():
        row |= {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}
    return row


def _interval(value: float, samples: pd.Series[float], num_clusters: int) -> Interval:
    if num_clusters < 2:
        return Interval(float(value), math.nan, math.nan)
    return percentile_interval(float(value), samples.to_numpy())
