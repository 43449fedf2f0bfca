"""Clusters of S tokens in tree order, by the method that the options name."""

from __future__ import annotations

import torch
from torch import Tensor

from flashhead_dist.index.bisect import bisect
from flashhead_dist.index.faiss_cells import faiss_cells
from flashhead_dist.index.metric import cluster_space
from flashhead_dist.index.options import IndexOptions
from flashhead_dist.index.progress import Report
from flashhead_dist.index.refine import MAX_ROUNDS, refine


def cluster_tokens(
    weights: Tensor,
    options: IndexOptions,
    *,
    moment: Tensor | None = None,
    report: Report = lambda stage, done: None,
) -> tuple[Tensor, int]:
    """Slots int64 `[C, S]` in tree order, -1 for pads, and the number of refinement rounds.

    weights: output embedding `[V, D]`, any floating dtype. Pinned tokens are left out.
    moment: `second_moment` of the calibration states, or None for the Euclidean metric.
    """
    kept = torch.ones(len(weights), dtype=torch.bool)
    kept[list(options.pinned_token_ids)] = False
    token_ids = torch.nonzero(kept).flatten().to(weights.device)
    report("Choosing the metric", 0.0)
    vectors = _vectors(weights, token_ids, options, moment)
    report("Choosing the metric", 1.0)
    slots = _first_clusters(vectors, options, options.num_clusters(len(weights)), report)
    slots, rounds = refine(
        vectors,
        slots,
        on_round=lambda done, share: report("Refining", done / MAX_ROUNDS),
    )
    report("Refining", 1.0)
    return token_ids[slots.clamp(min=0)].masked_fill_(slots < 0, -1), rounds


def _vectors(
    weights: Tensor, token_ids: Tensor, options: IndexOptions, moment: Tensor | None
) -> Tensor:
    rows = weights if len(token_ids) == len(weights) else weights[token_ids]
    if options.centroid_kind == "unit_norm":
        rows = torch.nn.functional.normalize(rows.float(), dim=1)
    return cluster_space(rows, moment, options.metric_exponent)


def _first_clusters(
    vectors: Tensor, options: IndexOptions, num_clusters: int, report: Report
) -> Tensor:
    if options.method == "faiss":
        return faiss_cells(
            vectors,
            num_clusters,
            options.cluster_size,
            seed=options.seed,
            on_step=lambda done: report("Clustering with faiss", done),
        )
    return bisect(
        vectors,
        num_clusters,
        options.cluster_size,
        seed=options.seed,
        on_level=lambda level, levels: report("Bisecting", level / levels),
    )
