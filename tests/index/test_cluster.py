"""Clusters as the options ask for them: pinned tokens, metric, and faiss as the alternative."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from flashhead_dist.index import HeadIndexError, IndexOptions, cluster
from flashhead_dist.index.cluster import cluster_tokens, second_moment


def _draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _options(**choices: Any) -> IndexOptions:
    return IndexOptions(**{"num_groups": 4, **choices})


def _planted(noise: float) -> tuple[Tensor, Tensor]:
    """Rows `[400, 16]`, fours around centres in the first 8 columns, `noise` in the others."""
    number = torch.arange(100).repeat_interleave(4)
    number = number[torch.randperm(400, generator=torch.Generator().manual_seed(3))]
    signal = _draw(100, 8)[number] + 0.02 * _draw(400, 8, seed=1)
    return torch.cat([signal, noise * _draw(400, 8, seed=2)], dim=1), number


def _purity(number: Tensor, slots: Tensor) -> float:
    return float((number[slots] == number[slots[:, :1]]).all(1).double().mean())


@pytest.mark.parametrize("method", ["bisect", "faiss"])
@pytest.mark.parametrize("size", [1, 4, 64])
@pytest.mark.parametrize("pinned", [(), (0, 5, 1012)])
@pytest.mark.parametrize("learned_metric", [False, True])
def test_every_token_that_is_not_pinned_is_in_one_slot(
    method: str, size: int, pinned: tuple[int, ...], learned_metric: bool
) -> None:
    weights = _draw(1013, 24).to(torch.bfloat16)
    moment = second_moment(_draw(50, 24, seed=1)) if learned_metric else None
    options = _options(cluster_size=size, pinned_token_ids=pinned, method=method)
    slots, rounds = cluster_tokens(weights, options, moment=moment)
    assert slots.shape == (options.num_clusters(1013), size)
    assert len(slots) % 4 == 0
    expected = [token for token in range(1013) if token not in pinned]
    assert slots[slots >= 0].sort().values.tolist() == expected
    assert (rounds == 0) == (size == 1)


def test_clusters_form_in_the_metric_of_the_states() -> None:
    """States never look at the columns of noise, so clusters should not either."""
    weights, number = _planted(noise=3.0)
    states = torch.cat([_draw(500, 8, seed=4), torch.zeros(500, 8)], dim=1)
    options = _options(metric_exponent=1.0)
    learned, _ = cluster_tokens(weights, options, moment=second_moment(states))
    euclidean, _ = cluster_tokens(weights, options)
    assert _purity(number, learned) > 0.95
    assert _purity(number, euclidean) < 0.1


def test_unit_norm_clusters_ignore_norms() -> None:
    weights, number = _planted(noise=0.0)
    scaled = weights * (4 * _draw(400, 1, seed=6)).exp2()
    assert _purity(number, cluster_tokens(scaled, _options())[0]) < 0.5
    unit_norm = _options(centroid_kind="unit_norm")
    assert _purity(number, cluster_tokens(scaled, unit_norm)[0]) > 0.95


@pytest.mark.parametrize("method", ["bisect", "faiss"])
def test_the_same_seed_gives_the_same_clusters(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "CLUSTERS_PER_CELL", 50)
    weights, moment = _draw(1013, 24), second_moment(_draw(50, 24, seed=1))
    options = _options(method=method, seed=7)
    torch.manual_seed(1)
    first, _ = cluster_tokens(weights, options, moment=moment)
    torch.manual_seed(2)
    assert torch.equal(cluster_tokens(weights, options, moment=moment)[0], first)


@pytest.mark.parametrize(("num_rows", "num_clusters", "size"), [(1013, 256, 4), (1000, 125, 8)])
def test_cells_are_filled_and_divided_evenly(
    num_rows: int, num_clusters: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "CLUSTERS_PER_CELL", 9)
    rows = _draw(num_rows, 12)
    slots = cluster.faiss_cells(rows, num_clusters, size, seed=0)
    assert torch.equal(slots[slots >= 0].sort().values, torch.arange(num_rows))
    filled = (slots >= 0).sum(1)
    assert set(filled.tolist()) <= {num_rows // num_clusters, -(-num_rows // num_clusters)}
    assert torch.equal(cluster.faiss_cells(rows, num_clusters, size, seed=0), slots)


def test_cells_are_those_of_k_means(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three blobs of 40 rows: each is a cell, where halves of the whole would cut one in two."""
    monkeypatch.setattr(cluster, "CLUSTERS_PER_CELL", 10)
    blob = torch.arange(3).repeat(40)
    rows = 5 * torch.eye(3, 12)[blob] + 0.5 * _draw(120, 12, seed=1)
    cells = cluster.faiss_cells(rows, 30, 4, seed=0).reshape(3, 40)
    assert bool((blob[cells] == blob[cells[:, :1]]).all())


def test_full_cells_keep_the_nearest_rows_and_pass_on_the_others() -> None:
    rows = torch.tensor([[0.5], [6.5], [1.0], [3.9], [4.2], [9.0]])
    cells = torch.tensor([[0.0], [10.0], [4.0]])
    filled = cluster._fill(rows, cells, torch.tensor([3, 3, 1]))
    # 3.9, 4.2 and 6.5 are all nearest to the third cell, which has room for 3.9 alone.
    assert [members.tolist() for members in filled] == [[0, 2, 4], [1, 5], [3]]


def test_similar_cells_are_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen cells along a line, which k-means gives in any order."""
    mixed = (torch.arange(16) * 7 % 16).unsqueeze(1)
    monkeypatch.setattr(cluster, "CLUSTERS_PER_CELL", 8)
    monkeypatch.setattr(cluster, "_k_means", lambda vectors, cells, seed: (mixed + 0.5) / 16)
    line = torch.linspace(0, 1, 512).unsqueeze(1)
    means = line[cluster.faiss_cells(line, 128, 4, seed=0)].mean((1, 2))
    assert float((means[1:] - means[:-1]).abs().max()) < 3 / 16


def test_faiss_that_is_not_there_is_a_sentence_with_a_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(HeadIndexError, match=r"pip install .*--method bisect"):
        cluster_tokens(_draw(100, 8), _options(method="faiss"))
