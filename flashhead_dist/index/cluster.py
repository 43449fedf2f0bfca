"""Clusters of S tokens in tree order, in a metric of what hidden states distinguish.

Rows w and w' get the same logit from h where h . (w - w') is small, so distances are measured in
(w - w')^T A (w - w') with A = (mean of h h^T over unit-normed calibration states)^exponent.
Exponent 1 is the mean squared difference of logits, which a few strong directions dominate; 0 is
Euclidean; between them clusters stay useful for texts that the calibration did not see. Clusters
are found in the leading principal axes only, which is cheaper and no worse.

`bisect` splits recursively at the median, `index.refine` improves the result. The alternative is
k-means cells by faiss, filled to equal size and bisected within: k-means down to clusters of four
rows would take hours and leave them unequal.

V rows `[V, D]`; C clusters of at most S rows; slots `[C, S]`, -1 where a cluster is short.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from flashhead_dist.index.options import HeadIndexError, IndexOptions
from flashhead_dist.index.refine import MAX_ROUNDS, refine
from flashhead_dist.progress import progress

CLUSTER_DIMENSIONS = 256
CLUSTERS_PER_CELL = 256
POWER_ITERATIONS = 8
SAMPLE_ROWS = 8192
"""Rows that estimate the principal direction of a larger node."""
_GRAM_ROWS = 96
"""Below this size a node's Gram matrix is cheaper than its rows."""
_CHUNK_FLOATS = 4 * 1024 * 1024
"""Rows of one batch, small enough to stay in a CPU's last-level cache over the iterations."""
_CHUNK_ROWS = 1 << 15
_RELATIVE_FLOOR = 1e-7
_K_MEANS_ITERATIONS = 20


def cluster_tokens(
    weights: Tensor,
    options: IndexOptions,
    *,
    moment: Tensor | None = None,
    visible: bool = False,
) -> tuple[Tensor, int]:
    """Slots int64 `[C, S]` in tree order, -1 for pads, and the number of refinement rounds.

    weights: output embedding `[V, D]`, any floating dtype. Pinned tokens are left out.
    moment: `second_moment` of the calibration states, or None for the Euclidean metric.
    visible: show progress on stderr.
    """
    unpinned = torch.ones(len(weights), dtype=torch.bool)
    unpinned[list(options.pinned_token_ids)] = False
    token_ids = torch.nonzero(unpinned).flatten().to(weights.device)
    rows = weights if len(token_ids) == len(weights) else weights[token_ids]
    if options.centroid_kind == "unit_norm":
        rows = torch.nn.functional.normalize(rows.float(), dim=1)
    vectors = cluster_space(rows, moment, options.metric_exponent)
    num_clusters, size = options.num_clusters(len(weights)), options.cluster_size
    form = bisect if options.method == "bisect" else faiss_cells
    with progress("clustering", total=100, unit="%", visible=visible) as advance:
        slots = form(vectors, num_clusters, size, seed=options.seed, advance=advance)
    with progress("refining", total=MAX_ROUNDS, unit="rounds at most", visible=visible) as advance:
        slots, rounds = refine(vectors, slots, on_round=lambda share: advance())
    return token_ids[slots.clamp(min=0)].masked_fill_(slots < 0, -1), rounds


def second_moment(states: Tensor) -> Tensor:
    """Mean float64 `[D, D]` of h h^T over unit-normed `states [N, D]`."""
    total = torch.zeros(states.shape[1], states.shape[1], dtype=torch.float64, device=states.device)
    for part in torch.split(states, _CHUNK_ROWS):
        unit = torch.nn.functional.normalize(part.double(), dim=1)
        total += unit.T @ unit
    return total / max(1, len(states))


def cluster_space(rows: Tensor, moment: Tensor | None, exponent: float) -> Tensor:
    """Coordinates float32 `[V, min(D, 256)]` of `rows [V, D]`, of mean 0, in which clusters form.

    moment: `[D, D]` from `second_moment`; None or an exponent of 0 keeps the Euclidean metric.
    """
    hidden_size = rows.shape[1]
    transform = torch.eye(hidden_size, dtype=torch.float64, device=rows.device)
    if moment is not None and exponent > 0:
        transform = _metric(moment.to(rows.device), exponent)
    mean, covariance = _mean_and_covariance(rows)
    _, axes = torch.linalg.eigh(transform.T @ covariance @ transform)
    # Leading axes first. Their sign is arbitrary, as is that of the transform's columns, so it is
    # fixed by the largest entry of what they make together.
    axes = transform @ axes.flip(1)[:, :CLUSTER_DIMENSIONS]
    largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
    projection = (axes * largest.sign()).float()
    offset = mean.float() @ projection
    result = torch.empty(len(rows), projection.shape[1], dtype=torch.float32, device=rows.device)
    for start in range(0, len(rows), _CHUNK_ROWS):
        part = slice(start, start + _CHUNK_ROWS)
        result[part] = rows[part].float() @ projection - offset
    return result


def score_deviations(residuals: Tensor, root: Tensor) -> Tensor:
    """Rms, over unit-normed states h, of h . r for residuals r `[..., D]`.

    root: of the states' second moment, from `moment_root`.
    """
    deviations: Tensor = torch.linalg.vector_norm(residuals @ root, dim=-1)
    return deviations


def moment_root(moment: Tensor | None, hidden_size: int) -> Tensor:
    """Matrix float32 `[D, D]` R with R R^T = moment; states in every direction alike where None."""
    if moment is None:
        return torch.eye(hidden_size, dtype=torch.float32) / math.sqrt(hidden_size)
    values, vectors = torch.linalg.eigh(moment)
    root: Tensor = (vectors * values.clamp(min=0).sqrt()).float()
    return root


def _metric(moment: Tensor, exponent: float) -> Tensor:
    """Matrix `[D, D]` after which Euclidean distance is the metric; A's mean eigenvalue is 1."""
    values, vectors = torch.linalg.eigh(moment)
    values = values.clamp(min=float(values[-1]) * _RELATIVE_FLOOR) ** exponent
    scaled: Tensor = vectors * (values / values.mean()).sqrt()
    return scaled


def _mean_and_covariance(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean `[D]` and covariance `[D, D]` of rows, float64."""
    hidden_size = rows.shape[1]
    total = torch.zeros(hidden_size, dtype=torch.float64, device=rows.device)
    products = torch.zeros(hidden_size, hidden_size, dtype=torch.float64, device=rows.device)
    for part in torch.split(rows, _CHUNK_ROWS):
        values = part.float()
        total += values.sum(0, dtype=torch.float64)
        products += values.T @ values
    mean = total / len(rows)
    return mean, products / len(rows) - torch.outer(mean, mean)


def bisect(
    vectors: Tensor,
    num_clusters: int,
    cluster_size: int,
    *,
    seed: int = 0,
    advance: Callable[[float], None] = lambda percent: None,
) -> Tensor:
    """Balanced bisection: slots int64 `[C, S]` in tree order, every row in exactly one slot.

    Every node of a level is split across its own principal direction so that both halves own their
    share of the clusters. The nodes of a level differ by at most one row or one cluster, so each
    level is a few batched products. Left and right are chosen so that a node's left half faces its
    left neighbour: clusters that are close in the final order are similar, and then go to different
    probing groups.

    vectors: `[V, D]` float32 with V <= C * S. Short clusters are spread evenly over the tree.
    advance: called with the percentage of the work just done.
    """
    num_rows, hidden_size = vectors.shape
    if num_rows > num_clusters * cluster_size:
        raise ValueError(f"{num_rows} rows do not fit {num_clusters} clusters of {cluster_size}")
    device = vectors.device
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(hidden_size, generator=generator, dtype=torch.float32).to(device)
    order = torch.arange(num_rows, device=device)
    counts = torch.tensor([num_rows])
    clusters = torch.tensor([num_clusters])
    levels = max(1, (num_clusters - 1).bit_length())
    for _ in range(levels):
        order = _split_level(vectors, order, counts, clusters, start)
        counts, clusters = _children(counts, clusters)
        advance(100 / levels)
    return _slots(order, counts, cluster_size)


def _children(counts: Tensor, clusters: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and clusters of the next level's nodes; a node of one cluster stays as it is."""
    left_clusters = (clusters + 1) // 2
    left_counts = (counts * left_clusters) // clusters
    pairs_counts = torch.stack([left_counts, counts - left_counts], dim=1).flatten()
    pairs_clusters = torch.stack([left_clusters, clusters - left_clusters], dim=1).flatten()
    keep = pairs_clusters > 0
    return pairs_counts[keep], pairs_clusters[keep]


def _split_level(
    vectors: Tensor, order: Tensor, counts: Tensor, clusters: Tensor, start: Tensor
) -> Tensor:
    """Reorder the rows of every node so that its first child's rows come first."""
    device = vectors.device
    starts = torch.cumsum(counts, 0) - counts
    result = order.clone()
    facing = _facing(vectors, order, starts, counts)
    for count, nodes in _equal_nodes(counts, clusters):
        per_chunk = max(1, _CHUNK_FLOATS // (count * vectors.shape[1]))
        for chunk in torch.split(nodes, per_chunk):
            places = (starts[chunk, None] + torch.arange(count)).to(device)
            members = order[places]
            projection = _project(vectors[members], facing[chunk.to(device)], start)
            ranks = torch.argsort(projection, dim=1, stable=True)
            result[places] = members.gather(1, ranks)
    return result


def _equal_nodes(counts: Tensor, clusters: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield (rows, node indices) for each size that still has something to split."""
    for count in torch.unique(counts).tolist():
        nodes = torch.nonzero((counts == count) & (clusters > 1)).flatten()
        if count > 1 and len(nodes):
            yield count, nodes


def _facing(vectors: Tensor, order: Tensor, starts: Tensor, counts: Tensor) -> Tensor:
    """Direction `[nodes, D]` from each node's left neighbour to its right one."""
    nodes = len(counts)
    owner = torch.repeat_interleave(torch.arange(nodes), counts).to(order.device)
    sums = torch.zeros(nodes, vectors.shape[1], dtype=torch.float32, device=vectors.device)
    for rows in torch.split(torch.arange(len(order), device=order.device), 1 << 16):
        sums.index_add_(0, owner[rows], vectors[order[rows]])
    means = sums / counts.clamp(min=1).to(sums.device).unsqueeze(1)
    right = torch.cat([means[1:], means[-1:]])
    left = torch.cat([means[:1], means[:-1]])
    return right - left


def _project(members: Tensor, facing: Tensor, start: Tensor) -> Tensor:
    """Coordinates `[k, n]` of `members [k, n, D]` along each node's principal direction."""
    centred = members - members.mean(dim=1, keepdim=True)
    if members.shape[1] <= _GRAM_ROWS:
        gram = centred @ centred.transpose(1, 2)
        weights = (centred @ start).unsqueeze(2)
        for _ in range(POWER_ITERATIONS):
            weights = gram @ weights
            weights = weights / weights.norm(dim=1, keepdim=True).clamp(min=1e-30)
        direction = (weights.transpose(1, 2) @ centred).squeeze(1)
    else:
        step = -(-members.shape[1] // SAMPLE_ROWS)
        sample = centred[:, ::step]
        direction = start.expand(len(members), -1)
        for _ in range(POWER_ITERATIONS):
            along = sample @ direction.unsqueeze(2)
            direction = (along.transpose(1, 2) @ sample).squeeze(1)
            direction = direction / direction.norm(dim=1, keepdim=True).clamp(min=1e-30)
    sign = torch.where((direction * facing).sum(1, keepdim=True) < 0, -1.0, 1.0)
    return (centred @ (direction * sign).unsqueeze(2)).squeeze(2)


def _slots(order: Tensor, counts: Tensor, cluster_size: int) -> Tensor:
    """Token slots `[C, S]` from rows in tree order and the rows of each cluster."""
    counts = counts.to(order.device)
    slots = torch.full((len(counts), cluster_size), -1, dtype=torch.int64, device=order.device)
    owner = torch.repeat_interleave(torch.arange(len(counts), device=order.device), counts)
    first = torch.cumsum(counts, 0) - counts
    slots[owner, torch.arange(len(order), device=order.device) - first[owner]] = order
    return slots


def faiss_cells(
    vectors: Tensor,
    num_clusters: int,
    cluster_size: int,
    *,
    seed: int,
    advance: Callable[[float], None] = lambda percent: None,
) -> Tensor:
    """Slots int64 `[C, S]` as of `bisect`, within cells that k-means found.

    Each cell takes as many rows as its clusters hold, nearest first. k-means runs on the GPU where
    faiss has one.

    Raises:
        HeadIndexError: faiss is not installed.
    """
    num_cells = max(1, min(num_clusters, len(vectors)) // CLUSTERS_PER_CELL)
    cells = _k_means(vectors, num_cells, seed)
    advance(50)
    # A bisection of the cells' centroids puts similar cells side by side.
    cells = cells[bisect(cells, num_cells, 1, seed=seed).flatten()]
    clusters = torch.full((num_cells,), num_clusters // num_cells)
    clusters[: num_clusters % num_cells] += 1
    members = _fill(vectors, cells, _rows_of_cells(clusters, len(vectors)))
    slots = []
    for cell, rows in enumerate(members):
        inside = bisect(vectors[rows], int(clusters[cell]), cluster_size, seed=seed)
        slots.append(rows[inside.clamp(min=0)].masked_fill_(inside < 0, -1))
        advance(50 / num_cells)
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
            'the faiss method needs faiss; run `pip install -e ".[faiss]"` or use --method bisect.'
        ) from error
    on_gpu = hasattr(faiss, "get_num_gpus") and faiss.get_num_gpus() > 0
    means: Any = faiss.Kmeans(
        vectors.shape[1],
        num_cells,
        niter=_K_MEANS_ITERATIONS,
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
