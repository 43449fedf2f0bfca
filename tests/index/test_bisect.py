"""Balanced bisection: equal clusters, every row once, similar rows side by side."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from flashhead_dist.index import cluster as module
from flashhead_dist.index.cluster import bisect

AWKWARD_SHAPES = (
    (1024, 256, 4),
    (1013, 256, 4),
    (1000, 125, 8),
    (130, 3, 64),
    (129, 2, 65),
    (5, 8, 1),
    (3, 8, 4),
    (1, 1, 4),
)
"""Rows, clusters, slots a cluster: full, prime, odd, and fewer rows than clusters."""


def _rows(num_rows: int, hidden_size: int, seed: int = 0) -> Tensor:
    return torch.randn(num_rows, hidden_size, generator=torch.Generator().manual_seed(seed))


def _blobs(rows_a_blob: int) -> tuple[Tensor, Tensor]:
    """Rows `[8 n, 16]` of eight blobs at the corners of a flat box, shuffled, and their blobs."""
    draw = torch.Generator().manual_seed(2)
    corner = torch.tensor(
        [[8.0 * a, 4.0 * b, 2.0 * c] for a in (-1, 1) for b in (-1, 1) for c in (-1, 1)]
    )
    blob = torch.arange(8).repeat(rows_a_blob)[torch.randperm(8 * rows_a_blob, generator=draw)]
    rows = 0.15 * torch.randn(len(blob), 16, generator=draw)
    rows[:, 5:8] += corner[blob]
    return rows, blob


@pytest.mark.parametrize(("num_rows", "num_clusters", "size"), AWKWARD_SHAPES)
@pytest.mark.parametrize("kind", ["normal", "zero", "few distinct"])
def test_every_row_is_in_one_slot_and_short_clusters_lack_one_row_at_most(
    num_rows: int, num_clusters: int, size: int, kind: str
) -> None:
    rows = _rows(num_rows, 24)
    if kind == "zero":
        rows = torch.zeros_like(rows)
    elif kind == "few distinct":
        rows = rows[torch.arange(num_rows) % 7 % num_rows]
    slots = bisect(rows, num_clusters, size)
    assert slots.shape == (num_clusters, size)
    assert torch.equal(slots[slots >= 0].sort().values, torch.arange(num_rows))
    filled = (slots >= 0).sum(1)
    assert set(filled.tolist()) <= {num_rows // num_clusters, -(-num_rows // num_clusters)}
    # Pads come last in their cluster.
    assert torch.equal(slots >= 0, torch.arange(size) < filled.unsqueeze(1))


def test_more_rows_than_slots_are_refused() -> None:
    with pytest.raises(ValueError, match="257 rows do not fit 64 clusters of 4"):
        bisect(_rows(257, 8), 64, 4)


@pytest.mark.parametrize("rows_a_blob", [4, 32, 150])
def test_blobs_come_apart_along_their_principal_directions(rows_a_blob: int) -> None:
    """Both ways to find a direction are used: Gram matrices of small nodes, rows of large ones."""
    rows, blob = _blobs(rows_a_blob)
    slots = bisect(rows, 8, rows_a_blob)
    assert bool((blob[slots] == blob[slots[:, :1]]).all())


@pytest.mark.parametrize("num_rows", [90, 1000])
def test_a_node_is_split_across_its_principal_direction(num_rows: int) -> None:
    """One direction in 64 has four times the variance of any other."""
    rows = _rows(num_rows, 64)
    rows[:, 9] *= 2
    left, right = rows[bisect(rows, 2, num_rows // 2), 9]
    separation = float((left.mean() - right.mean()).abs())
    # Halves of a normal distribution of deviation 2 lie 4 * sqrt(2 / pi) = 3.2 apart.
    assert separation > 2.4


def test_a_sample_of_a_large_node_gives_the_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, blob = _blobs(150)
    monkeypatch.setattr(module, "SAMPLE_ROWS", 64)
    slots = bisect(rows, 8, 150)
    assert bool((blob[slots] == blob[slots[:, :1]]).all())


def test_copies_of_a_row_share_a_cluster() -> None:
    draw = torch.Generator().manual_seed(1)
    number = torch.arange(256).repeat_interleave(4)[torch.randperm(1024, generator=draw)]
    slots = bisect(_rows(256, 24)[number], 256, 4)
    assert bool((number[slots] == number[slots[:, :1]]).all())


def test_neighbours_in_the_order_are_similar() -> None:
    """Rows on a circle come out along the circle, cut open twice at most.

    Directions taken without regard to the neighbours would reverse some of the arcs.
    """
    angle = 2 * math.pi * torch.rand(1024, generator=torch.Generator().manual_seed(0))
    rows = torch.stack([angle.cos(), angle.sin()], dim=1)
    order = bisect(rows, 1024, 1).flatten()
    steps = (rows[order][1:] - rows[order][:-1]).norm(dim=1)
    assert int((steps > 0.1).sum()) <= 1
    assert float(steps.sum()) < 1.5 * 2 * math.pi


def test_neighbouring_clusters_are_nearer_than_distant_ones() -> None:
    rows = _rows(1013, 4)
    slots = bisect(rows, 256, 4)
    real = (slots >= 0).unsqueeze(-1)
    means = (rows[slots.clamp(min=0)] * real).sum(1) / real.sum(1)
    one_apart = (means[1:] - means[:-1]).norm(dim=1).mean()
    far_apart = (means[100:] - means[:-100]).norm(dim=1).mean()
    assert float(one_apart) < 0.5 * float(far_apart)


def test_the_same_seed_gives_the_same_slots_however_nodes_are_batched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = _rows(1500, 24)
    torch.manual_seed(1)
    first = bisect(rows, 384, 4, seed=5)
    torch.manual_seed(2)
    assert torch.equal(bisect(rows, 384, 4, seed=5), first)
    monkeypatch.setattr(module, "_CHUNK_FLOATS", 5000)
    assert torch.equal(bisect(rows, 384, 4, seed=5), first)


def test_levels_are_reported_up_to_the_last() -> None:
    percents: list[float] = []
    bisect(_rows(90, 8), 24, 4, advance=percents.append)
    assert percents == [20.0] * 5
