"""From clusters in tree order to the tensors of an index, group by group.

Tree cluster t goes to group t % G, slot t // G: neighbours in the tree, which compete for the same
hidden states, are in different groups, so that equal shares of probes serve every state.

*Fewer columns.* The score of a centroid c for a hidden state h is h . c. Over states of second
moment A and centroids of covariance K, the m-term bilinear form x(h) . y(c) that comes closest
to it in the mean square (up to h . mean, which is the same for every cluster) takes the m leading
eigenvectors of A^(1/2) K A^(1/2): the optimal rank-m approximation of Eckart and Young
(https://doi.org/10.1007/BF02288367) in the metric of the states. Coordinates are scaled so that
centroids vary alike along each of them, and rotated at random, so that one scale serves a group of
columns well.

*Rounding* after GPTQ (Frantar et al., https://arxiv.org/abs/2210.17323), so that errors cancel in
the directions hidden states take: columns are rounded one after another, the column with the most
energy first, and what a column loses is made up by those still to come, as the second moment of the
hidden states says. All centroids share that moment, so one factorization serves them all. Plain
rounding hurts states of great norm along few directions most, as Indic scripts have.

G groups of M clusters of S tokens; D hidden size, m centroid columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flashhead_dist.index.cluster import moment_root, score_deviations
from flashhead_dist.index.options import IndexOptions
from flashhead_kernels.quantize import (
    Projection,
    QuantizedCentroids,
    centroid_scales,
    integer_limit,
    pack_centroids,
    quantize_centroids,
    tile_centroids,
)
from flashhead_kernels.shard import IndexShard

_CHUNK_CLUSTERS = 8192
_RELATIVE_FLOOR = 1e-7
_DAMPING = 0.01
_BLOCK_COLUMNS = 64


def round_robin(slots: Tensor, num_groups: int) -> Tensor:
    """Assign clusters in tree order `[C, ...]` to groups: `[G, M, ...]`."""
    assigned = slots.reshape(len(slots) // num_groups, num_groups, *slots.shape[1:])
    # A clone has plain strides even where a dimension is 1, which contiguous() may leave odd.
    return assigned.transpose(0, 1).clone(memory_format=torch.contiguous_format)


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
    token_ids = round_robin(slots, options.num_groups).to(torch.int32)
    shape = token_ids.shape[:2]
    centroids, spread = describe_clusters(
        weights, token_ids.flatten(0, 1), moment, unit_norm=options.centroid_kind == "unit_norm"
    )
    centroids, spread = centroids.reshape(*shape, -1), spread.reshape(shape)
    quantized, spread = quantize(centroids, spread, options, moment)
    pinned = _pinned_by_group(pinned_token_ids, options.num_groups, weights.device)
    return IndexShard(
        rows=_take(weights, token_ids),
        token_ids=token_ids,
        centroids=tile_centroids(quantized),
        spread=spread,
        pinned_rows=_take(weights, pinned),
        pinned_token_ids=pinned,
        group_ids=torch.arange(options.num_groups, device=pinned.device),
    )


def quantize(
    centroids: Tensor, spread: Tensor, options: IndexOptions, moment: Tensor | None
) -> tuple[QuantizedCentroids, Tensor]:
    """Centroids `[..., D]` in the bits and columns of `options`, and the spread `[...]` to store.

    With fewer columns the spread also counts what they leave out (`_with_left_out`).
    """
    bits, group_size, columns = options.centroid_bits, options.group_size, options.centroid_columns
    exact, exact_moment, projection = centroids, moment, None
    if columns is not None:
        real = ~torch.isneginf(spread)
        mean, covariance = centroid_covariance(centroids[real])
        axes = leading_axes(covariance, moment, columns, seed=options.seed)
        device = centroids.device
        projection = Projection(axes.to_state.T.contiguous().to(device), mean.to(device))
        centred = (centroids - projection.mean) * real.unsqueeze(-1)
        centroids = centred @ axes.to_centroid.to(device)
        moment = None if moment is None else axes.moment(moment)
    if moment is None or bits == 16:
        quantized = quantize_centroids(centroids, bits, group_size)
    else:
        quantized = quantize_for_states(centroids, moment, bits, group_size)
    if projection is None:
        return quantized, spread
    stored = quantized.dequantize()
    spread = _with_left_out(spread, exact, stored, projection, exact_moment)
    return replace(quantized, projection=projection), spread


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


def _with_left_out(
    spread: Tensor,
    centroids: Tensor,
    stored: Tensor,
    projection: Projection,
    moment: Tensor | None = None,
) -> Tensor:
    """`spread [...]` with what fewer columns leave out: the root of the sum of both squares.

    centroids `[..., D]`, stored as `[..., m]` in the columns of `projection`. What is left out is,
    as the spread, an rms over hidden states of norm 1 and second moment `moment`: of a centroid's
    logit less its probing score. A score is as doubtful for that as for rows that stray, and a pair
    of similar rows may have little else.
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
            score_deviations(exact - projection.mean - columns @ projection.to_state, root)
            for exact, columns in flat
        ]
    )
    wider = torch.hypot(spread, left_out.reshape(spread.shape))
    return torch.where(torch.isneginf(spread), spread, wider)


def keep_spread(tensors: IndexShard, before: Tensor) -> Tensor:
    """The spread `[G, M]` of `tensors`, whose clusters have lost tokens to pins since `before`.

    A cluster with a single row has no spread, and alpha raises the scores of all others above its
    own: the last token would seldom be found. Such a cluster keeps the spread that it had.
    """
    single = (tensors.token_ids >= 0).sum(-1) == 1
    return torch.where(single, torch.maximum(before, tensors.spread), tensors.spread)


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


def _pinned_by_group(token_ids: Sequence[int], num_groups: int, device: torch.device) -> Tensor:
    """Pinned ids assigned to groups: int32 `[G, n]`, -1 where a group has one fewer."""
    pads = [-1] * (-len(token_ids) % num_groups)
    padded = torch.tensor([*token_ids, *pads], dtype=torch.int32, device=device)
    return round_robin(padded, num_groups)


@dataclass(frozen=True)
class LeadingAxes:
    """Coordinates of centroids and of hidden states, float32 `[D, m]` each.

    `(h @ to_state) . (c @ to_centroid)` approximates h . c for centroids c less their mean.
    """

    to_centroid: Tensor
    to_state: Tensor

    def moment(self, second_moment: Tensor) -> Tensor:
        """Second moment `[m, m]` of states in these coordinates, from theirs `[D, D]`."""
        projection = self.to_state.to(second_moment)
        return projection.T @ second_moment @ projection


def leading_axes(
    covariance: Tensor, second_moment: Tensor | None, num_axes: int, *, seed: int = 0
) -> LeadingAxes:
    """The best `num_axes` coordinates for scoring centroids.

    covariance: of the centroids, `[D, D]`. second_moment: `metric.second_moment` of calibration
    states, `[D, D]`; None counts states in every direction alike. Double precision inside.

    Raises:
        ValueError: `num_axes` outside 1..D.
    """
    hidden_size = len(covariance)
    if not 1 <= num_axes <= hidden_size:
        raise ValueError(f"{num_axes} axes must lie between 1 and the hidden size {hidden_size}")
    covariance = covariance.double().cpu()
    moment = torch.eye(hidden_size, dtype=torch.float64)
    if second_moment is not None:
        moment = second_moment.double().cpu()
    energies, directions = torch.linalg.eigh(moment)
    energies = _above_floor(energies)
    root = (directions * energies.sqrt()) @ directions.T
    inverse_root = (directions / energies.sqrt()) @ directions.T
    variances, axes = torch.linalg.eigh(root @ covariance @ root)
    axes = axes.flip(1)[:, :num_axes]
    deviations = _above_floor(variances).flip(0)[:num_axes].sqrt()
    # The sign of an eigenvector is arbitrary: fixed by the largest entry of what it makes.
    to_state = inverse_root @ axes
    sign = to_state.gather(0, to_state.abs().argmax(0, keepdim=True)).sign()
    rotation = _rotation(num_axes, seed)
    return LeadingAxes(
        to_centroid=((root @ axes) * sign / deviations @ rotation).float(),
        to_state=(to_state * sign * deviations @ rotation).float(),
    )


def centroid_covariance(centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Mean float32 `[D]` and covariance float64 `[D, D]` of `centroids [..., D]`."""
    flat = centroids.flatten(0, -2).float()
    mean = flat.mean(0, dtype=torch.float64)
    total = torch.zeros(flat.shape[1], flat.shape[1], dtype=torch.float64, device=flat.device)
    for part in torch.split(flat, 1 << 15):
        centred = part - mean.float()
        total += centred.T @ centred
    return mean.float(), total / max(1, len(flat))


def _above_floor(values: Tensor) -> Tensor:
    """`values`, ascending, none below a small part of the greatest; ones where all are zero."""
    greatest = float(values[-1])
    return values.clamp(min=greatest * _RELATIVE_FLOOR) if greatest > 0 else torch.ones_like(values)


def _rotation(size: int, seed: int) -> Tensor:
    """A random orthogonal matrix, float64 `[size, size]`."""
    generator = torch.Generator().manual_seed(seed)
    rotation: Tensor = torch.linalg.qr(
        torch.randn(size, size, generator=generator, dtype=torch.float64)
    )[0]
    return rotation


def quantize_for_states(
    centroids: Tensor, second_moment: Tensor, bits: int, group_size: int
) -> QuantizedCentroids:
    """Quantize float32 `centroids [..., D]` to 4 or 8 bits with least expected error of a score.

    second_moment: `[D, D]`, mean of h h^T over (unit-normed) hidden states.
    Scales are those of `quantize_centroids`; only the rounding differs.

    Raises:
        ValueError: what `centroid_scales` refuses, or centroids that are not finite.
    """
    if not bool(torch.isfinite(centroids).all()):
        raise ValueError("centroids must be finite: the output embedding holds NaN or inf")
    shape = centroids.shape
    flat = centroids.reshape(-1, shape[-1]).float()
    scales = centroid_scales(flat, bits, group_size)
    order, factor = _elimination(second_moment.to(flat.device))
    remaining = flat.T[order].contiguous()
    integers = torch.empty(remaining.shape, dtype=torch.int8, device=flat.device)
    limit = integer_limit(bits)
    # Columns are rows here, so that each step works on contiguous memory.
    column_scales = scales.float().T
    for start in range(0, shape[-1], _BLOCK_COLUMNS):
        stop = min(start + _BLOCK_COLUMNS, shape[-1])
        losses = torch.empty(stop - start, flat.shape[0], dtype=torch.float32, device=flat.device)
        for column in range(start, stop):
            scale = column_scales[int(order[column]) // group_size]
            quotient = torch.where(scale > 0, remaining[column] / scale, scale)
            rounded = quotient.round_().clamp_(-limit, limit)
            integers[column] = rounded.to(torch.int8)
            loss = (remaining[column] - rounded * scale) / factor[column, column]
            losses[column - start] = loss
            remaining[column + 1 : stop] -= factor[column, column + 1 : stop, None] * loss
        remaining[stop:] -= factor[start:stop, stop:].T @ losses
    restored = torch.empty_like(integers)
    restored[order] = integers
    return pack_centroids(
        restored.T.contiguous().reshape(shape),
        scales.reshape(*shape[:-1], -1),
        bits,
    )


def _elimination(second_moment: Tensor) -> tuple[Tensor, Tensor]:
    """Column order `[D]` and the upper Cholesky factor of the inverse moment in that order."""
    moment = second_moment.double()
    damping = _DAMPING * moment.diagonal().mean().clamp(min=1e-30)
    moment = moment + damping * torch.eye(len(moment), device=moment.device, dtype=moment.dtype)
    order = torch.argsort(moment.diagonal(), descending=True, stable=True)
    inverse = torch.linalg.inv(moment[order][:, order])
    return order, torch.linalg.cholesky(inverse, upper=True).float()
