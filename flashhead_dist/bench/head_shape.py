"""The shape of a run's heads, as the cost model takes it."""

from __future__ import annotations

import torch

from flashhead_dist.index import IndexManifest
from flashhead_dist.index.escalation import USUAL_SHARE
from flashhead_dist.models import ModelSource
from flashhead_topology.head_shape import HeadShape


def head_shape_of(
    model: ModelSource,
    manifest: IndexManifest | None = None,
    *,
    num_probes: int | None = None,
    dtype: torch.dtype | None = None,
) -> HeadShape:
    """The shape of the heads over `model` and an index of it.

    num_probes: as given to the heads; the index's own where None.
    dtype: of the rows and columns; the model's where None.
    """
    row_type = dtype or model.dtype
    if manifest is not None:
        return shape_of_index(manifest, num_probes=num_probes, row_bytes=row_type.itemsize)
    return HeadShape(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        row_bits=8 * row_type.itemsize,
        logit_bytes=row_type.itemsize,
    )


def shape_of_index(
    manifest: IndexManifest, *, num_probes: int | None = None, row_bytes: int = 2
) -> HeadShape:
    """The shape of the heads over an index.

    num_probes: as given to the heads; the index's own where None.
    row_bytes: of one number of a row, and of a logit that is gathered.
    """
    return HeadShape(
        vocab_size=manifest.vocab_size,
        hidden_size=manifest.hidden_size,
        num_clusters=manifest.num_clusters,
        cluster_size=manifest.cluster_size,
        num_probes=manifest.num_probes if num_probes is None else num_probes,
        centroid_bits=manifest.bits,
        group_size=manifest.group_size,
        num_groups=manifest.num_groups,
        pinned_per_group=manifest.num_pinned,
        row_bits=8 * row_bytes,
        logit_bytes=row_bytes,
        escalated_share=USUAL_SHARE,
        centroid_columns=manifest.centroid_columns or 0,
    )
