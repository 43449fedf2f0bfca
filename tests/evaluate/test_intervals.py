"""Confidence intervals against closed forms, coverage, and what clusters do to them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from flashhead_dist.evaluate.intervals import (
    DRAWS,
    bootstrap_median,
    cluster_means,
    percentile_interval,
    wilson,
)


def test_wilson_is_the_published_example_and_has_a_width_at_one() -> None:
    # Newcombe (1998), Statistics in Medicine 17, table I, method 3: 81 of 263 and 0 of 20.
    found = wilson(81, 263)
    assert (round(found.low, 4), round(found.high, 4)) == (0.2553, 0.3662)
    none = wilson(0, 20)
    assert none.low == 0
    assert round(none.high, 4) == 0.1611
    every = wilson(20, 20)
    assert every.value == every.high == 1
    assert round(every.low, 4) == 1 - 0.1611
    with pytest.raises(ValueError, match="at least one"):
        wilson(0, 0)


def test_the_bootstrap_of_clusters_of_one_is_the_usual_standard_error() -> None:
    draw = np.random.default_rng(1)
    values = draw.normal(size=(400, 1))
    numbers = np.arange(400)
    means = cluster_means(values, numbers, np.zeros(400, dtype=int))
    assert means.shape == (DRAWS, 1)
    expected = values.std() / math.sqrt(400)
    assert means.std() == pytest.approx(expected, rel=0.06)
    found = percentile_interval(float(values.mean()), means[:, 0])
    assert found.high - found.low == pytest.approx(2 * 1.96 * expected, rel=0.1)


def test_states_of_a_document_count_as_one() -> None:
    """Fails where states are drawn one by one: the interval would be ten times as narrow."""
    draw = np.random.default_rng(2)
    documents = np.repeat(np.arange(40), 100)
    values = draw.normal(size=40)[documents][:, None]
    means = cluster_means(values, documents, np.zeros(4000, dtype=int))
    assert means.std() == pytest.approx(values.std() / math.sqrt(40), rel=0.1)


def test_strata_keep_their_number_of_documents() -> None:
    """Fails where documents of all sources are drawn from one urn: the mean would move."""
    values = np.repeat([0.0, 1.0], 50)[:, None]
    documents = np.arange(100) // 5
    sources = np.repeat([0, 1], 50)
    assert np.allclose(cluster_means(values, documents, sources), 0.5)
    assert cluster_means(values, documents, np.zeros(100, dtype=int)).std() > 0.05


def test_documents_of_unequal_length_weigh_by_their_states() -> None:
    values = np.concatenate([np.ones(90), np.zeros(10)])[:, None]
    documents = np.concatenate([np.zeros(90), np.ones(10)]).astype(int)
    means = cluster_means(values, documents, np.zeros(100, dtype=int))[:, 0]
    # Two documents drawn twice: both the first, one of each, both the second.
    assert set(np.round(means, 6)) == {0.0, 0.9, 1.0}


def test_intervals_cover_as_often_as_they_say() -> None:
    draw = np.random.default_rng(3)
    covered = 0
    for number in range(200):
        values = draw.normal(size=(60, 1))
        means = cluster_means(values, np.arange(60), np.zeros(60, dtype=int), seed=number)
        found = percentile_interval(float(values.mean()), means[:, 0])
        covered += found.low <= 0 <= found.high
    assert 0.88 <= covered / 200 <= 0.99


def test_a_median_of_censored_values_is_a_value_or_no_number_at_all() -> None:
    found = bootstrap_median(np.array([3.0, 9.0, 12.0, math.inf, math.inf]))
    assert (found.value, found.low) == (12.0, 3.0)
    assert found.high == math.inf
    most = bootstrap_median(np.array([5.0] + [math.inf] * 9))
    assert most.value == most.low == math.inf
    assert bootstrap_median(np.array([7.0])).high == 7.0
