"""What settings find, without building their indexes or needing a kernel.

Probing is local to a group, so only the group that holds a state's dense argmax decides whether it
is found, and what a setting finds with any number of probes follows from one rank per state: how
many clusters of that group score higher than the right one. Clusters of every size are halves and
unions of the clusters of one tree.

V vocabulary, D hidden size, N states of all parts; C clusters of S tokens in tree order, -1 for
pads; G groups of M clusters, m centroid columns.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from flashhead_dist.index.calibrate import missed_tokens
from flashhead_dist.index.layout import describe_clusters, quantize
from flashhead_dist.index.options import IndexOptions
from flashhead_dist.index.refine import splits
from flashhead_dist.states.split import Parts
from flashhead_dist.tune.front import HALF, Record, undominated
from flashhead_dist.tune.settings import (
    MAX_BYTES_SHARE,
    RESCORED,
    ROW_GROUP,
    Family,
    SearchSpace,
    Setting,
    Shape,
)
from flashhead_kernels.quantize import quantize_centroids, quantize_hidden_states

_CHUNK_STATES = 2048
_CHUNK_CLUSTERS = 8192
_LARGEST_HALVED = 8
_COMPARED = ("top1_worst", "top1", HALF)


@dataclass(frozen=True)
class Shares:
    """Of states whose dense argmax is a candidate: over all, and in the worst source."""

    overall: float
    num_states: int
    worst: float
    worst_source: str
    num_worst_states: int


@dataclass(frozen=True)
class StateRange:
    """States `rows` of all, with the source of each."""

    rows: slice
    source_ids: Tensor
    sources: tuple[str, ...]

    def shares(self, found: Tensor) -> Shares:
        """Shares of `found` bool `[N]`, of all states, in this range."""
        mine = found[self.rows].double().cpu()
        totals = torch.bincount(self.source_ids, minlength=len(self.sources))
        hits = torch.bincount(self.source_ids, weights=mine, minlength=len(self.sources))
        shares = torch.where(totals > 0, hits / totals.clamp(min=1), torch.inf)
        worst = int(shares.argmin())
        return Shares(
            float(mine.mean()),
            len(mine),
            float(shares[worst]),
            self.sources[worst],
            int(totals[worst]),
        )


@dataclass(frozen=True)
class TuningData:
    """What all settings are simulated on.

    weights `[V, D]`; slots int64 `[C, S]`; vectors `[V, d]`, rows in the metric that clusters form
    in; moment float64 `[D, D]` of the calibration states, or None; states `[N, D]`; top_tokens
    int64 `[N, t]`, the dense head's best tokens, best first.
    """

    weights: Tensor
    slots: Tensor
    vectors: Tensor
    moment: Tensor | None
    num_groups: int
    states: Tensor
    top_tokens: Tensor
    calibration: StateRange
    selection: StateRange
    held_out: StateRange | None

    @property
    def shape(self) -> Shape:
        return Shape(self.weights.shape[0], self.weights.shape[1], self.num_groups)

    def clusters(self, options: IndexOptions) -> Tensor:
        """Slots of the size that `options` say, without the tokens that they pin."""
        slots = resize(self.slots, self.vectors, options.cluster_size)
        pinned = torch.tensor(options.pinned_token_ids, dtype=slots.dtype)
        return slots.masked_fill(torch.isin(slots, pinned), -1)


def join(parts: Parts) -> tuple[Tensor, list[StateRange]]:
    """States `[N, D]` of all parts, one after another, and the range of each part."""
    given = [parts.calibration, parts.selection]
    if parts.held_out is not None:
        given.append(parts.held_out)
    ranges, start = [], 0
    for part in given:
        ranges.append(StateRange(slice(start, start + len(part)), part.source_ids, part.sources))
        start += len(part)
    return torch.cat([part.states for part in given]), ranges


def resize(slots: Tensor, vectors: Tensor, cluster_size: int) -> Tensor:
    """Slots `[C * S / cluster_size, cluster_size]` in tree order, from `slots [C, S]`.

    vectors: `[V, d]`, rows in the metric that clusters form in. Larger clusters are neighbours in
    the tree, a smaller one is the better half of one; both sizes are powers of two.

    Raises:
        ValueError: clusters that do not pair up evenly.
    """
    while slots.shape[1] > cluster_size:
        slots = halve(slots, vectors)
    count = cluster_size // slots.shape[1]
    if len(slots) % count:
        raise ValueError(f"{len(slots)} clusters do not make unions of {count}")
    return slots.reshape(-1, cluster_size)


def halve(slots: Tensor, vectors: Tensor) -> Tensor:
    """Divide each cluster into the two halves of least summed squared distance to their means.

    Returns slots `[2C, S / 2]`; the halves of a cluster are neighbours. A pad counts as a row at
    the mean of all rows, as in `index.refine`.

    Raises:
        ValueError: S above 8, which has too many halves.
    """
    count, size = slots.shape
    if size > _LARGEST_HALVED:
        raise ValueError(f"clusters of {size} have too many halves")
    orders = splits(size // 2).to(slots.device)
    halves = torch.empty_like(slots)
    for part in torch.split(torch.arange(count, device=slots.device), _CHUNK_CLUSTERS):
        ids = slots[part]
        rows = torch.index_select(vectors, 0, ids.clamp(min=0).flatten())
        rows = rows.view(*ids.shape, -1) * (ids >= 0).unsqueeze(2)
        gram = rows @ rows.transpose(1, 2)
        # The fall of the distance is linear in the Gram matrix: see `index.refine`.
        gains = sum(
            gram[:, half[:, :, None], half[:, None, :]].sum((2, 3)) for half in orders.chunk(2, 1)
        )
        halves[part] = ids.gather(1, orders[torch.as_tensor(gains).argmax(1)])
    return halves.view(2 * count, size // 2)


@dataclass(frozen=True)
class Clusters:
    """Clusters in tree order: token_ids `[C, S]`, centroids `[C, D]`, spread `[C]`."""

    token_ids: Tensor
    centroids: Tensor
    spread: Tensor


class Simulator:
    """Ranks of right clusters in the groups of `data`, for settings that need not have a kernel."""

    def __init__(self, data: TuningData) -> None:
        self.data = data
        self._clusters: dict[int, Clusters] = {}

    def clusters(self, cluster_size: int) -> Clusters:
        """The tree's clusters of that size, computed once; ValueError where it has none."""
        if cluster_size not in self._clusters:
            data = self.data
            ids = resize(data.slots, data.vectors, cluster_size)
            described = describe_clusters(data.weights, ids, data.moment)
            self._clusters[cluster_size] = Clusters(ids, *described)
        return self._clusters[cluster_size]

    def home_clusters(self, cluster_size: int, tokens: Tensor) -> Tensor:
        """Cluster int64 of each of `tokens`, in their shape; -1 for a pinned token.

        Cluster t is in group t % G, at slot t // G of it.
        """
        ids = self.clusters(cluster_size).token_ids
        home = torch.full((len(self.data.weights),), -1, dtype=torch.int64)
        real = ids >= 0
        home[ids[real]] = torch.arange(len(ids)).unsqueeze(1).expand_as(ids)[real]
        found: Tensor = home[tokens]
        return found

    def ranks(self, family: Family, alphas: Sequence[float]) -> Tensor:
        """Clusters of its group that come before the dense argmax's, int32 `[alphas, N]`.

        -1 for a token in no cluster. Ties go to the lower slot.

        Raises:
            ValueError: clusters that do not fill the groups evenly, or centroids that scales do not
                fit.
        """
        data, groups = self.data, self.data.num_groups
        clusters = self.clusters(family.cluster_size)
        centroids, spread, states = self._stored(family)
        if len(centroids) % groups:
            raise ValueError(f"{len(centroids)} clusters do not fill {groups} groups evenly")
        norms = torch.linalg.vector_norm(data.states.float(), dim=1, keepdim=True)
        empty = (clusters.token_ids < 0).all(1)
        home = self.home_clusters(family.cluster_size, data.top_tokens[:, 0])
        slots = torch.arange(len(centroids) // groups)
        ranks = torch.full((len(alphas), len(home)), -1, dtype=torch.int32)
        for group in range(groups):
            members = torch.nonzero((home >= 0) & (home % groups == group)).flatten()
            for rows in torch.split(members, _CHUNK_STATES):
                dots = states[rows] @ centroids[group::groups].T
                dots = dots.masked_fill(empty[group::groups], float("-inf"))
                deviations = norms[rows] * spread[group::groups].clamp(min=0)
                own = (home[rows] // groups).unsqueeze(1)
                for place, alpha in enumerate(alphas):
                    scores = dots + alpha * deviations if alpha else dots
                    mine = scores.gather(1, own)
                    before = (scores > mine) | ((scores == mine) & (slots < own))
                    ranks[place, rows] = before.sum(1).to(torch.int32)
        return ranks

    @cached_property
    def int8_logits(self) -> Tensor:
        """Logits float32 `[N, t]` of the dense head's best tokens with rows rounded to int8.

        A scale for each ROW_GROUP columns, states rounded alike: as centroids of 8 bits are scored.
        """
        data = self.data
        hidden_size = data.weights.shape[1]
        group_size = ROW_GROUP if hidden_size % ROW_GROUP == 0 else hidden_size
        logits = torch.empty(data.top_tokens.shape)
        for part in torch.split(torch.arange(len(logits)), 2 * _CHUNK_STATES):
            rows = data.weights[data.top_tokens[part]]
            rounded = quantize_centroids(rows, 8, group_size).dequantize()
            hidden = _rounded(data.states[part], group_size)
            logits[part] = (rounded @ hidden.unsqueeze(2)).squeeze(2)
        return logits

    def _stored(self, family: Family) -> tuple[Tensor, Tensor, Tensor]:
        """Centroids `[C, m]` and spread `[C]` as stored, states `[N, m]` as kernels round them."""
        clusters, data = self.clusters(family.cluster_size), self.data
        options = family.index_options(data.shape)
        quantized, spread = quantize(clusters.centroids, clusters.spread, options, data.moment)
        states = data.states.float()
        if quantized.projection is not None:
            states = states @ quantized.projection.to_state.T
        if family.centroid_bits < 16:
            states = _rounded(states, family.group_size)
        return quantized.dequantize(), spread, states


def _rounded(states: Tensor, group_size: int) -> Tensor:
    """States as the kernels round them to int8."""
    integers, scales = quantize_hidden_states(states, group_size)
    return integers * scales.repeat_interleave(group_size, dim=1)


def survives(logits: Tensor, groups: Tensor) -> Tensor:
    """Whether int8 rows still lead to the dense argmax: bool `[N]`.

    Each group scores its RESCORED best candidates by int8 rows again by their exact rows, so the
    first token is lost where as many others of its group look better in int8. Only the dense head's
    best tokens can: the others are further away than rounding reaches.

    logits: `[N, t]`. groups: int64 `[N, t]`, -1 for a pinned token, which is scored by its own row.
    """
    rivals = (groups == groups[:, :1]) & (logits > logits[:, :1])
    return (groups[:, 0] < 0) | (rivals.sum(1) < RESCORED)


def measure_family(
    simulator: Simulator, family: Family, space: SearchSpace, frequent: Sequence[int]
) -> list[Record]:
    """Records of the family's settings that no other with the same alpha and row bits dominates.

    Not across alphas: the choice weighs them against a few states (`front.choose`).
    frequent: token ids, most frequent first.

    Raises:
        ValueError: as `Simulator.ranks`.
    """
    data = simulator.data
    ranks = simulator.ranks(family, space.alphas)
    home = simulator.home_clusters(family.cluster_size, data.top_tokens)
    groups = torch.where(home < 0, -1, home % data.num_groups)
    exact = torch.ones(len(groups), dtype=torch.bool)
    survivors = {16: exact, 8: survives(simulator.int8_logits, groups)}
    records: dict[tuple[int, float], list[Record]] = defaultdict(list)
    for setting, found, by_half in _found(data, family, space, frequent, ranks):
        for bits in space.row_bits:
            with_bits = replace(setting, row_bits=bits)
            if data.shape.bytes_share(with_bits) <= MAX_BYTES_SHARE:
                both = found & survivors[bits], by_half & survivors[bits]
                records[bits, setting.alpha].append(_record(with_bits, *both, data))
    return [
        record for alike in records.values() for record in undominated(alike, agreements=_COMPARED)
    ]


def _found(
    data: TuningData, family: Family, space: SearchSpace, frequent: Sequence[int], ranks: Tensor
) -> Iterator[tuple[Setting, Tensor, Tensor]]:
    """Settings with 16-bit rows, and the states `[N]` that all and half of their probes find."""
    tokens = data.top_tokens[:, 0]
    calibrating = data.calibration.rows
    is_frequent = {
        count: _among(tokens, frequent[:count], len(data.weights)) for _, count in space.pins
    }
    for probes in space.probes(family, data.shape):
        for alpha, of_alpha in zip(space.alphas, ranks, strict=True):
            ranked = of_alpha[calibrating], tokens[calibrating]
            is_learned = {
                count: _among(tokens, missed_tokens(*ranked, probes, count), len(data.weights))
                for count in {learned for learned, _ in space.pins}
            }
            for learned, count in space.pins:
                pinned = is_learned[learned] | is_frequent[count]
                setting = Setting.of(
                    family,
                    alpha=alpha,
                    probes_per_group=probes,
                    learned_pins=learned,
                    frequent_pins=min(count, len(frequent)),
                )
                yield setting, (of_alpha < probes) | pinned, (2 * of_alpha < probes) | pinned


def _record(setting: Setting, found: Tensor, by_half: Tensor, data: TuningData) -> Record:
    """One flat record: the choices, the bytes, and the shares found in each part of the states.

    found, by_half: bool `[N]`, states whose dense argmax is a candidate with all of the probes and
    with half of them.
    """
    record: Record = {
        "family": setting.key,
        **asdict(setting),
        "candidates": setting.probes_per_group * data.num_groups * setting.cluster_size,
        "bytes_share": data.shape.bytes_share(setting),
        HALF: data.selection.shares(by_half).overall,
    }
    for prefix, part in (("", data.selection), ("held_out_", data.held_out)):
        if part is not None:
            shares = part.shares(found)
            record |= {
                f"{prefix}top1": shares.overall,
                f"{prefix}top1_worst": shares.worst,
                f"{prefix}worst_source": shares.worst_source,
                f"{prefix}worst_states": shares.num_worst_states,
                f"{prefix}states": shares.num_states,
            }
    return record


def _among(tokens: Tensor, chosen: Sequence[int], vocab_size: int) -> Tensor:
    """Which of `tokens [N]` are among `chosen`: bool `[N]`."""
    table = torch.zeros(vocab_size, dtype=torch.bool)
    table[torch.tensor(chosen, dtype=torch.int64)] = True
    return table[tokens]
