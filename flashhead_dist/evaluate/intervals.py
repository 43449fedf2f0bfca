"""Confidence intervals of shares, means and medians, for samples that come in clusters.

Hidden states of one document are alike, so the unit that is drawn is the document: a cluster
bootstrap (Davison and Hinkley, Bootstrap Methods and their Application, 1997, section 3.8) with
percentile limits. With a handful of documents its intervals are too narrow, as percentile limits of
few units are, and where no state differs it has no width at all. A share's interval is therefore at
least Wilson's over the states (Wilson, JASA 22, 1927), which has a width even at 0 and 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

LEVEL = 0.95
DRAWS = 2000
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


def blocks_of(count: int, size: int = 64) -> Array:
    """Cluster numbers int `[count]` where documents are unknown: runs of `size` states."""
    numbers: Array = np.arange(count) // size
    return numbers
