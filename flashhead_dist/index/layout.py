"""From clusters in tree order to the tensors of an index, group by group.

Tree cluster t goes to group t % G, slot t // G: neighbours in the tree, which compete for the same
hidden states, land in different groups, so that equal shares of probes serve every state.
G groups of M clusters of S tokens; D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from flashhead_dist.index.axes import centroid_covariance, leading_axes
from flashhead_dist.index.compensate import quantize_for_states
from flashhead_dist.index.metric import moment_root, score_deviations
from flashhead_dist.index.options import IndexOptions
from flashhead_kernels.quantize import (
    Projection,
    QuantizedCentroids,
    quantize_centroids,
    tile_centroids,
)
from flashhead_kernels.shard import IndexShard

_CHUNK_CLUSTERS = 8192


def deal(slots: Tensor, num_groups: int) -> Tensor:
    """Deal clusters in tree order `[C, ...]` round-robin: `[G, M, ...]`."""
    dealt = slots.reshape(len(slots) // num_groups, num_groups, *slots.shape[1:])
    # A clone has plain strides even where a dimension is 1, which contiguous() may leave odd.
    return dealt.transpose(0, 1).clone(memory_format=torch.contiguous_format)


def lay_out(
    weights: Tensor,
    slots: Tensor,
    pinned_token_ids: Sequence[int],
    options: IndexOptions,
    moment: Tensor | None = None,
) -> IndexShard:
    """Tensors of the index of `weights [V, D]` whose clusters in tree order are `slots [C, S]`.

    slots: int64 token ids, -1 for pads; they and the pinned ids cover every token once.
    moment: `second_moment` of the calibration states, which rounds centroids to suit them; None
        rounds to nearest.
    """
    token_ids = deal(slots, options.num_groups).to(torch.int32)
    shape = token_ids.shape[:2]
    centroids, spread = describe_clusters(
        weights, token_ids.flatten(0, 1), moment, unit_norm=options.centroid_kind == "unit_norm"
    )
    centroids, spread = centroids.reshape(*shape, -1), spread.reshape(shape)
    quantized = _quantize(centroids, spread, moment, options)
    if quantized.projection is not None:
        stored = quantized.dequantize()
        spread = with_left_out(spread, centroids, stored, quantized.projection, moment)
    pinned = _deal_pinned(pinned_token_ids, options.num_groups, weights.device)
    return IndexShard(
        rows=_take(weights, token_ids),
        token_ids=token_ids,
        centroids=tile_centroids(quantized),
        spread=spread,
        pinned_rows=_take(weights, pinned),
        pinned_token_ids=pinned,
        group_ids=torch.arange(options.num_groups, device=pinned.device),
    )


def _quantize(
    centroids: Tensor, spread: Tensor, moment: Tensor | None, options: IndexOptions
) -> QuantizedCentroids:
    """Store `centroids [G, M, D]`, in the columns that the options leave them."""
    bits, group_size, columns = options.centroid_bits, options.group_size, options.centroid_columns
    projection = None
    if columns is not None:
        real = ~torch.isneginf(spread)
        mean, covariance = centroid_covariance(centroids[real])
        axes = leading_axes(covariance, moment, columns, seed=options.seed)
        device = centroids.device
        to_state = axes.to_state.T.contiguous().to(device)
        projection = Projection(to_state, mean.to(device))
        centred = (centroids - projection.mean) * real.unsqueeze(-1)
        centroids = centred @ axes.to_centroid.to(device)
        moment = None if moment is None else axes.moment(moment)
    if moment is None or bits == 16:
        quantized = quantize_centroids(centroids, bits, group_size)
    else:
        quantized = quantize_for_states(centroids, moment, bits, group_size)
    return replace(quantized, projection=projection)


def describe_clusters(
    weights: Tensor, token_ids: Tensor, moment: Tensor | None = None, *, unit_norm: bool = False
) -> tuple[Tensor, Tensor]:
    """Centroids `[C, D]` and spread `[C]`, both float32, of clusters `token_ids [C, S]`.

    The spread is that of the row which strays most from the plain mean: the rms, over hidden states
    of norm 1 and second moment `moment`, of the difference of the two logits. -inf without rows.
    """
    root = moment_root(moment, weights.shape[1]).to(weights.device)
    centroids = torch.zeros(
        len(token_ids), weights.shape[1], dtype=torch.float32, device=weights.device
    )
    spread = torch.full(
        (len(token_ids),), float("-inf"), dtype=torch.float32, device=weights.device
    )
    for start in range(0, len(token_ids), _CHUNK_CLUSTERS):
        places = slice(start, start + _CHUNK_CLUSTERS)
        ids = token_ids[places].to(weights.device)
        rows, real = _take(weights, ids).float(), (ids >= 0).unsqueeze(-1)
        count = real.sum(1)
        mean = rows.sum(1) / count.clamp(min=1)
        strays = score_deviations((rows - mean.unsqueeze(1)) * real, root).amax(1)
        spread[places] = torch.where(count.squeeze(1) > 0, strays, spread[places])
        if unit_norm:
            unit = torch.nn.functional.normalize(rows, dim=-1).sum(1)
            mean = torch.nn.functional.normalize(unit, dim=-1)
        centroids[places] = mean
    return centroids, spread


def with_left_out(
    spread: Tensor,
    centroids: Tensor,
    stored: Tensor,
    projection: Projection,
    moment: Tensor | None = None,
) -> Tensor:
    """`spread [...]` with what fewer columns leave out: the root of the sum of both squares.

    centroids `[..., D]`, of which `stored [..., m]` are kept in the columns of `projection`. What
    is left out is, as the spread, an rms over hidden states of norm 1 and second moment `moment`:
    of a centroid's logit less its probing score. It is as good a reason to doubt a score as rows
    that stray, and a pair of near rows may have little else.
    """
    size = centroids.shape[-1]
    root = moment_root(moment, size).to(centroids.device)
    flat = zip(
        torch.split(centroids.reshape(-1, size), _CHUNK_CLUSTERS),
        torch.split(stored.flatten(0, -2), _CHUNK_CLUSTERS),
        strict=True,
    )
    left_out = torch.cat(
        [
            score_deviations(exact - projection.mean - kept @ projection.to_state, root)
            for exact, kept in flat
        ]
    )
    wider = torch.hypot(spread, left_out.reshape(spread.shape))
    return torch.where(torch.isneginf(spread), spread, wider)


def keep_spread(tensors: IndexShard, before: Tensor) -> Tensor:
    """The spread `[G, M]` of `tensors`, whose clusters have lost tokens to pins since `before`.

    A cluster left with one row has none, and alpha raises the scores of all others above its own:
    the token that pins left alone would seldom be found. It keeps the spread that it had.
    """
    alone = (tensors.token_ids >= 0).sum(-1) == 1
    return torch.where(alone, torch.maximum(before, tensors.spread), tensors.spread)


def cohesion(weights: Tensor, slots: Tensor) -> float:
    """Mean over the tokens of `slots [C, S]` of the cosine of a row to its cluster's mean."""
    total = 0.0
    for ids in torch.split(slots, 8192):
        rows = _take(weights, ids).float()
        mean = rows.sum(1, keepdim=True)
        cosine = torch.nn.functional.cosine_similarity(rows, mean, dim=-1)
        total += float(cosine[ids >= 0].sum(dtype=torch.float64))
    return total / max(1, int((slots >= 0).sum()))


def _take(weights: Tensor, ids: Tensor) -> Tensor:
    """Rows `[..., D]` of `ids [...]`, zero where the id is -1."""
    rows = weights[ids.clamp(min=0).long()]
    return rows.masked_fill_((ids < 0).unsqueeze(-1), 0)


def _deal_pinned(token_ids: Sequence[int], num_groups: int, device: torch.device) -> Tensor:
    """Deal pinned ids over groups: int32 `[G, n]`, -1 where a group has one fewer."""
    pads = [-1] * (-len(token_ids) % num_groups)
    padded = torch.tensor([*token_ids, *pads], dtype=torch.int32, device=device)
    return deal(padded, num_groups)
