"""The clustering alternative: k-means cells by faiss, filled to equal size, bisected within.

k-means down to clusters of four rows would take hours and leave them unequal, so faiss finds coarse
cells, each takes as many rows as its clusters hold, nearest first, and bisection divides the cells.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flashhead_dist.index.bisect import bisect
from flashhead_dist.index.options import HeadIndexError

CLUSTERS_A_CELL = 256
_ITERATIONS = 20


def faiss_cells(
    vectors: Tensor,
    num_clusters: int,
    cluster_size: int,
    *,
    seed: int,
    on_step: Callable[[float], None] = lambda done: None,
) -> Tensor:
    """Slots int64 `[C, S]`, cells in tree order, -1 for pads, each row of `vectors [V, D]` once.

    Runs k-means on the GPU where faiss has one.

    Raises:
        HeadIndexError: faiss is not installed.
    """
    num_cells = max(1, min(num_clusters, len(vectors)) // CLUSTERS_A_CELL)
    cells = _k_means(vectors, num_cells, seed)
    on_step(0.5)
    # A bisection of the cells' centroids puts similar cells side by side.
    cells = cells[bisect(cells, num_cells, 1, seed=seed).flatten()]
    clusters = torch.full((num_cells,), num_clusters // num_cells)
    clusters[: num_clusters % num_cells] += 1
    members = _fill(vectors, cells, _rows_of_cells(clusters, len(vectors)))
    slots = []
    for cell, rows in enumerate(members):
        inside = bisect(vectors[rows], int(clusters[cell]), cluster_size, seed=seed)
        slots.append(rows[inside.clamp(min=0)].masked_fill_(inside < 0, -1))
        on_step(0.5 + 0.5 * (cell + 1) / num_cells)
    return torch.cat(slots)


def _rows_of_cells(clusters: Tensor, num_rows: int) -> Tensor:
    """Rows that each cell takes: in proportion to its clusters, `num_rows` in all."""
    ends = torch.cumsum(clusters, 0) * num_rows // clusters.sum()
    return torch.diff(ends, prepend=torch.zeros(1, dtype=ends.dtype))


def _k_means(vectors: Tensor, num_cells: int, seed: int) -> Tensor:
    """Centroids float32 `[num_cells, D]` on the device of `vectors`."""
    try:
        import faiss
    except ImportError as error:
        raise HeadIndexError(
            'the faiss method needs faiss; run `pip install "flashhead-dist[faiss]"` or use '
            "--method bisect."
        ) from error
    on_gpu = hasattr(faiss, "get_num_gpus") and faiss.get_num_gpus() > 0
    means: Any = faiss.Kmeans(
        vectors.shape[1],
        num_cells,
        niter=_ITERATIONS,
        seed=seed + 1,
        gpu=on_gpu,
        min_points_per_centroid=1,
        max_points_per_centroid=512,
    )
    means.train(vectors.cpu().numpy())
    return torch.from_numpy(means.centroids).to(vectors.device)


def _fill(vectors: Tensor, cells: Tensor, capacity: Tensor) -> list[Tensor]:
    """Row ids of each cell: rows choose the nearest cell with room, cells the nearest rows."""
    device = vectors.device
    room = capacity.to(device).clone()
    home = torch.full((len(vectors),), -1, dtype=torch.int64, device=device)
    waiting = torch.arange(len(vectors), device=device)
    # Half the squared distance, negated: rows of different norms are compared for one cell, too.
    closeness = vectors @ cells.T - cells.square().sum(1) / 2
    closeness -= vectors.square().sum(1, keepdim=True) / 2
    while len(waiting):
        open_cells = closeness[waiting].masked_fill_(room == 0, float("-inf"))
        value, choice = open_cells.max(1)
        # Sorted by cell, nearest first: a row's place within its cell says whether it gets in.
        order = torch.argsort(value, descending=True, stable=True)
        order = order[torch.argsort(choice[order], stable=True)]
        wanted = torch.bincount(choice, minlength=len(cells))
        place = torch.arange(len(order), device=device)
        place -= (torch.cumsum(wanted, 0) - wanted)[choice[order]]
        accepted = order[place < room[choice[order]]]
        home[waiting[accepted]] = choice[accepted]
        room -= torch.bincount(choice[accepted], minlength=len(cells))
        waiting = waiting[home[waiting] < 0]
    return [torch.nonzero(home == cell).flatten() for cell in range(len(cells))]
