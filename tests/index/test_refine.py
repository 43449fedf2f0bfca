"""Refinement: near clusters divide their rows again, and the distance to the means falls."""

from __future__ import annotations

from itertools import combinations, product

import pytest
import torch
from torch import Tensor

from flashhead_dist.index import refine
from flashhead_dist.index.cluster import bisect


def _rows(num_rows: int, hidden_size: int, seed: int = 0) -> Tensor:
    """Rows `[num_rows, hidden_size]` of mean 0."""
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randn(num_rows, hidden_size, generator=draw)
    return rows - rows.mean(0)


def _gathered(rows: Tensor, slots: Tensor) -> Tensor:
    """`[C, S, D]`, zeros for pads."""
    return rows[slots.clamp(min=0)] * (slots >= 0).unsqueeze(-1)


def _distance(clustered: Tensor) -> float:
    """Summed squared distance of rows `[..., S, D]` to their cluster's mean."""
    clustered = clustered.double()
    return float((clustered - clustered.mean(-2, keepdim=True)).square().sum())


def _planted(num_clusters: int, size: int, noise: float = 0.2) -> tuple[Tensor, Tensor]:
    """Shuffled rows around centres that no tree of halves respects, and each row's centre."""
    draw = torch.Generator().manual_seed(4)
    centres = torch.randn(num_clusters, 12, generator=draw)
    number = torch.arange(num_clusters).repeat_interleave(size)
    number = number[torch.randperm(len(number), generator=draw)]
    rows = centres[number] + noise * torch.randn(len(number), 12, generator=draw)
    return rows - rows.mean(0), number


def _purity(number: Tensor, slots: Tensor) -> float:
    """Share of clusters `[C, S]` whose rows are all of one centre."""
    return float((number[slots] == number[slots[:, :1]]).all(1).double().mean())


def _splitter(size: int) -> list[tuple[int, ...]]:
    """Positions of the first cluster, for every division that is considered."""
    if size <= 4:
        return list(combinations(range(2 * size), size))
    exchanges = [tuple(range(size))]
    for mine, theirs in product(range(size), range(size, 2 * size)):
        exchanges.append(tuple(theirs if place == mine else place for place in range(size)))
    return exchanges


@pytest.mark.parametrize("size", [2, 4, 8, 16])
@pytest.mark.parametrize("pads", [0, 3])
def test_the_best_division_is_that_of_brute_force(size: int, pads: int) -> None:
    rows = _rows(6 * size, 10, seed=size)
    slots = torch.randperm(6 * size, generator=torch.Generator().manual_seed(1)).reshape(6, size)
    slots[2, :pads] = -1
    slots[5, size - pads // 3 :] = -1
    clustered = _gathered(rows, slots)
    pairs = torch.tensor(list(combinations(range(6), 2)))
    splitter = refine.PairSplitter(clustered)
    gains = splitter.gains(pairs)
    divided = splitter.split(pairs, slots[pairs].flatten(1))
    assert divided.shape == (15, 2, size)
    for pair, gain, result in zip(pairs, gains, divided, strict=True):
        pooled = clustered[pair].flatten(0, 1)
        everything = set(range(2 * size))
        distances = [
            _distance(torch.stack([pooled[list(left)], pooled[sorted(everything - set(left))]]))
            for left in _splitter(size)
        ]
        before = _distance(clustered[pair])
        assert float(gain) == pytest.approx(before - min(distances), abs=1e-4)
        assert _distance(_gathered(rows, result)) == pytest.approx(min(distances), abs=1e-4)
        assert torch.equal(result.flatten().sort().values, slots[pair].flatten().sort().values)


def test_a_pair_that_is_divided_at_its_best_stays() -> None:
    rows, _ = _planted(2, 4)
    slots = bisect(rows, 2, 4)
    pair = torch.tensor([[0, 1]])
    for _ in range(2):
        splitter = refine.PairSplitter(_gathered(rows, slots))
        slots = splitter.split(pair, slots[pair].flatten(1))[0]
    splitter = refine.PairSplitter(_gathered(rows, slots))
    assert float(splitter.gains(pair)) == 0.0
    assert torch.equal(splitter.split(pair, slots[pair].flatten(1))[0], slots)


def test_gains_follow_changes_that_are_told_and_chunks_do_not_matter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clustered = _rows(40, 6).reshape(10, 4, 6)
    pairs = torch.tensor(list(combinations(range(10), 2)))
    splitter = refine.PairSplitter(clustered)
    clustered[[2, 7]] = _rows(8, 6, seed=1).reshape(2, 4, 6)
    splitter.update(torch.tensor([2, 7]))
    fresh = refine.PairSplitter(clustered.clone())
    assert torch.allclose(splitter.gains(pairs), fresh.gains(pairs), atol=1e-5)
    slots = torch.arange(40).reshape(10, 4)[pairs].flatten(1)
    gains, divided = fresh.gains(pairs), fresh.split(pairs, slots)
    monkeypatch.setattr(refine, "_CHUNK_FLOATS", 150)
    few = refine.PairSplitter(clustered.clone())
    assert torch.allclose(few.gains(pairs), gains, atol=1e-5)
    assert torch.equal(few.split(pairs, slots), divided)


@pytest.mark.parametrize("num_clusters", [2, 9, 65, 300])
def test_near_pairs_are_the_nearest_neighbours(num_clusters: int) -> None:
    clustered = _rows(num_clusters * 4, 6).reshape(num_clusters, 4, 6)
    means = clustered.double().mean(1)
    distances = torch.cdist(means, means).fill_diagonal_(float("inf"))
    count = min(8, num_clusters - 1)
    nearest = distances.topk(count, dim=1, largest=False).indices
    expected = {
        (min(one, other), max(one, other))
        for one, others in enumerate(nearest.tolist())
        for other in others
    }
    # Ascending, so neither a pair twice nor both orders of one; and no cluster with itself.
    assert refine.neighbour_pairs(clustered).tolist() == [list(pair) for pair in sorted(expected)]


def test_near_pairs_need_few_of_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refine, "_BLOCKS_SEARCHED", 3)
    line = torch.linspace(0, 100, 1000).reshape(1000, 1, 1)
    pairs = refine.neighbour_pairs(line)
    assert bool((pairs[:, 0] < pairs[:, 1]).all())
    found = {tuple(pair) for pair in pairs.tolist()}
    assert {(place, place + 1) for place in range(999)} <= found


@pytest.mark.parametrize("size", [2, 4, 8])
def test_no_round_raises_the_distance(size: int) -> None:
    rows = _rows(317 * size - 5, 12)
    slots = bisect(rows, 317, size)
    shares: list[float] = []
    _, rounds = refine.refine(rows, slots, on_round=shares.append)
    assert 3 < rounds == len(shares) < refine.MAX_ROUNDS
    distances = [_distance(_gathered(rows, slots))]
    for limit in range(1, rounds + 1):
        refined, done = refine.refine(rows, slots, max_rounds=limit)
        assert done == limit
        assert torch.equal(refined.flatten().sort().values, slots.flatten().sort().values)
        distances.append(_distance(_gathered(rows, refined)))
    for before, after, share in zip(distances[:-1], distances[1:], shares, strict=True):
        assert before - after == pytest.approx(share * before, rel=1e-3, abs=1e-5 * before)
        assert share > 0
    assert distances[-1] < 0.9 * distances[0]


@pytest.mark.parametrize(("size", "expected"), [(2, 0.97), (4, 0.97), (8, 0.85)])
def test_planted_clusters_that_bisection_breaks_are_recovered(size: int, expected: float) -> None:
    rows, number = _planted(192, size)
    slots = bisect(rows, 192, size)
    refined, _ = refine.refine(rows, slots)
    assert _purity(number, slots) < 0.5
    assert _purity(number, refined) > expected


def test_what_is_as_it_should_be_is_left_alone() -> None:
    rows, number = _planted(100, 4, noise=0.001)
    slots = torch.argsort(number, stable=True).reshape(100, 4)
    refined, rounds = refine.refine(rows, slots)
    assert rounds == 0
    assert torch.equal(refined, slots)


@pytest.mark.parametrize(("num_clusters", "size"), [(32, 1), (1, 8)])
def test_nothing_to_divide_changes_nothing(num_clusters: int, size: int) -> None:
    slots = torch.randperm(num_clusters * size).reshape(num_clusters, size)
    refined, rounds = refine.refine(_rows(num_clusters * size, 6), slots)
    assert rounds == 0
    assert torch.equal(refined, slots)


def test_rows_that_are_all_alike_are_left_alone() -> None:
    slots = torch.arange(400).reshape(100, 4)
    refined, rounds = refine.refine(torch.zeros(400, 6), slots)
    assert rounds == 0
    assert torch.equal(refined, slots)


def test_the_result_is_the_same_again_and_the_argument_is_not_changed() -> None:
    rows = _rows(1000, 12)
    slots = bisect(rows, 256, 4)
    kept = slots.clone()
    first, _ = refine.refine(rows, slots)
    assert torch.equal(slots, kept)
    assert torch.equal(refine.refine(rows, slots)[0], first)


def test_a_round_takes_the_greatest_gains_and_no_cluster_twice() -> None:
    draw = torch.Generator().manual_seed(6)
    pairs = torch.combinations(torch.arange(30))
    gains = torch.rand(len(pairs), generator=draw)
    gains[::50] = 0.9
    taken = refine._disjoint(pairs, gains, 0.85, 30)
    busy: set[int] = set()
    expected = []
    for index in torch.argsort(gains, descending=True, stable=True).tolist():
        pair = set(pairs[index].tolist())
        if float(gains[index]) > 0.85 and not busy & pair:
            busy |= pair
            expected.append(index)
    assert sorted(taken.tolist()) == sorted(expected)
