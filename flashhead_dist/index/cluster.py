"""Clusters of S tokens in tree order, by the method that the options name."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flashhead_dist.index.bisect import bisect
from flashhead_dist.index.metric import apply_metric
from flashhead_dist.index.options import IndexOptions

Report = Callable[[str, float], None]
"""Called with a stage's name and the share of it that is done."""


def cluster_tokens(
    weights: Tensor,
    options: IndexOptions,
    *,
    transform: Tensor | None = None,
    report: Report = lambda stage, done: None,
) -> tuple[Tensor, int]:
    """Slots int64 `[C, S]` in tree order, -1 for pads, and the refinement rounds that were kept.

    weights: output embedding `[V, D]`, any floating dtype. Pinned tokens are left out.
    transform: `[D, D]` of `hidden_metric`, or None for the Euclidean metric.
    """
    kept = torch.ones(len(weights), dtype=torch.bool)
    kept[list(options.pinned_token_ids)] = False
    token_ids = torch.nonzero(kept).flatten().to(weights.device)
    vectors = _vectors(weights, token_ids, options, transform)
    num_clusters = options.num_clusters(len(weights))
    slots = bisect(
        vectors,
        num_clusters,
        options.cluster_size,
        seed=options.seed,
        on_level=lambda level, levels: report("Bisecting", level / levels),
    )
    named = token_ids[slots.clamp(min=0)].masked_fill_(slots < 0, -1)
    return named, 0


def _vectors(
    weights: Tensor, token_ids: Tensor, options: IndexOptions, transform: Tensor | None
) -> Tensor:
    rows = weights if len(token_ids) == len(weights) else weights[token_ids]
    if options.centroid_kind == "unit_norm":
        rows = torch.nn.functional.normalize(rows.float(), dim=1)
    return rows.float() if transform is None else apply_metric(rows, transform)
