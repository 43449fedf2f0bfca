"""What a builder may choose: each mistake is a sentence that names the value and the remedy."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest

from flashhead_dist.errors import UserError
from flashhead_dist.index import IndexOptions
from flashhead_dist.index.options import PROBED_SHARE

V, D = 1013, 96


@pytest.mark.parametrize(
    ("choice", "value", "remedy"),
    [
        ("cluster_size", 3, "one of 1, 2, 4, 8, 16, 32, 64"),
        ("cluster_size", 128, "one of 1, 2, 4, 8, 16, 32, 64"),
        ("cluster_size", 0, "one of 1, 2, 4, 8, 16, 32, 64"),
        ("centroid_bits", 5, "4, 8 or 16"),
        ("num_groups", 0, "between 1 and"),
        ("group_size", 0, "too small"),
        ("seed", -1, "between 0 and"),
        ("seed", 2**31, "between 0 and"),
        ("method", "kmeans", "bisect, faiss"),
        ("centroid_kind", "median", "mean, unit_norm"),
        ("learned_pins_per_group", -1, "0 for none"),
        ("metric_exponent", 1.5, "between 0 and 1"),
        ("metric_exponent", float("nan"), "between 0 and 1"),
        ("alpha", -0.1, "between 0 and 100"),
        ("alpha", float("nan"), "between 0 and 100"),
        ("alpha", float("inf"), "between 0 and 100"),
        ("pinned_token_ids", (4, 4), "each once"),
        ("num_probes", 0, "between 1 and the 256 clusters"),
        ("num_probes", 257, "between 1 and the 256 clusters"),
        ("pinned_token_ids", (5, 1013), "ids from 0 to 1012"),
        ("pinned_token_ids", (-1,), "ids from 0 to 1012"),
        ("pinned_token_ids", tuple(range(V)), "leave some"),
        ("group_size", 64, "--group-size 32"),
        ("group_size", 3, "--group-size 32"),
    ],
)
def test_a_choice_that_cannot_be_is_refused(choice: str, value: Any, remedy: str) -> None:
    fine: dict[str, Any] = {"group_size": 32, "num_groups": 8}
    IndexOptions(**fine).check(V, D)
    with pytest.raises(UserError) as refusal:
        IndexOptions(**fine | {choice: value}).check(V, D)
    message = str(refusal.value)
    assert remedy in message
    assert message.endswith(".")
    if not isinstance(value, tuple):
        assert str(value) in message


def test_any_group_size_suits_centroids_without_scales() -> None:
    IndexOptions(centroid_bits=16).check(V, D)


def test_the_ends_of_each_range_are_allowed() -> None:
    for num_probes in (1, 256):
        IndexOptions(num_groups=8, group_size=32, num_probes=num_probes).check(V, D)
    for exponent in (0, 1):
        IndexOptions(metric_exponent=exponent)
    IndexOptions(group_size=96, pinned_token_ids=(0, V - 1), alpha=0).check(V, D)


@pytest.mark.parametrize(
    ("vocab_size", "size", "groups", "pinned", "clusters"),
    [
        (262_144, 4, 128, 0, 65_536),
        (1013, 4, 8, 0, 256),
        (1024, 4, 8, 0, 256),
        (1025, 4, 8, 0, 264),
        (1025, 4, 8, 1, 256),
        (5, 1, 8, 0, 8),
        (151_936, 1, 128, 0, 151_936),
    ],
)
def test_clusters_fill_the_groups_evenly_and_so_do_probes(
    vocab_size: int, size: int, groups: int, pinned: int, clusters: int
) -> None:
    options = IndexOptions(
        cluster_size=size, num_groups=groups, pinned_token_ids=tuple(range(pinned))
    )
    assert options.num_clusters(vocab_size) == clusters
    probes = options.probes(vocab_size)
    assert probes % groups == 0
    assert clusters / PROBED_SHARE <= probes < clusters / PROBED_SHARE + groups
    assert replace(options, num_probes=3).probes(vocab_size) == 3


def test_fingerprints_differ_where_any_choice_does() -> None:
    changed: dict[str, Any] = {
        "cluster_size": 8,
        "centroid_bits": 8,
        "group_size": 32,
        "centroid_columns": 384,
        "num_groups": 64,
        "pinned_token_ids": (3,),
        "learned_pins_per_group": 0,
        "pin_special_tokens": False,
        "method": "faiss",
        "centroid_kind": "unit_norm",
        "alpha": 0.5,
        "num_probes": 100,
        "metric_exponent": 0.1,
        "seed": 1,
    }
    assert set(changed) == {field.name for field in fields(IndexOptions)}
    prints = {IndexOptions(**{name: value}).fingerprint() for name, value in changed.items()}
    assert len(prints | {IndexOptions().fingerprint()}) == len(changed) + 1
    assert IndexOptions().fingerprint() == IndexOptions().fingerprint()
