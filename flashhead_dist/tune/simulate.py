"""How many clusters go before the right one, for a setting that need not have a kernel.

Groups probe their own share, so only the group that holds a state's dense argmax decides whether it
is found, and what a setting finds with any number of probes follows from one rank a state. N states
`[N, D]`, C clusters of S tokens, G groups of M clusters, m centroid columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flashhead_dist.index.axes import centroid_covariance, leading_axes
from flashhead_dist.index.compensate import quantize_for_states
from flashhead_dist.index.layout import deal, describe_clusters, with_left_out
from flashhead_dist.tune.nested import resize
from flashhead_dist.tune.points import BLOCK_EDGES, Family
from flashhead_dist.tune.scene import Scene
from flashhead_kernels.quantize import Projection, quantize_centroids, quantize_hidden_states

_CHUNK_STATES = 2048
_CHUNK_CLUSTERS = 8192
_KEPT_ROUNDED = 3


@dataclass(frozen=True)
class Described:
    """Clusters in tree order: token_ids `[C, S]`, centroids `[C, D]`, spread `[C]`."""

    token_ids: Tensor
    centroids: Tensor
    spread: Tensor


@dataclass(frozen=True)
class _Level:
    """What scores a level's clusters: centroids `[C, m]`, states `[N, m]`, empty bool `[C]`.

    deviations(rows, clusters) gives what alpha multiplies, `[n, c]`.
    """

    centroids: Tensor
    states: Tensor
    empty: Tensor
    deviations: Callable[[Tensor, Tensor], Tensor]

    def scores(self, rows: Tensor, clusters: Tensor, alphas: Sequence[float]) -> Iterator[Tensor]:
        """Probing scores `[n, c]` for each of `alphas`."""
        dots = self.states[rows] @ self.centroids[clusters].T
        dots = dots.masked_fill(self.empty[clusters], float("-inf"))
        deviations = self.deviations(rows, clusters) if any(alphas) else None
        for alpha in alphas:
            yield dots if deviations is None or not alpha else dots + alpha * deviations


class Simulator:
    """Ranks of right clusters in a scene; clusters and centroids last used are kept."""

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        self._described: dict[int, Described] = {}
        self._rounded_last: dict[tuple[int, ...], tuple[Tensor, Tensor, Tensor]] = {}
        self._norms = torch.linalg.vector_norm(scene.states.float(), dim=1)

    def clusters(self, cluster_size: int) -> Described:
        """The tree's clusters of that size; ValueError where it has none."""
        if cluster_size not in self._described:
            scene = self._scene
            ids = resize(scene.slots, scene.vectors, cluster_size)
            centroids, spread = describe_clusters(scene.weights, ids, scene.moment)
            self._described[cluster_size] = Described(ids, centroids, spread)
        return self._described[cluster_size]

    def forget(self, cluster_size: int) -> None:
        """Let go of the clusters of a size: hundreds of megabytes."""
        self._described.pop(cluster_size, None)

    def home_groups(self, family: Family, tokens: Tensor) -> Tensor:
        """Probing group int64 of each of `tokens`, in their shape; -1 for one in no cluster."""
        home = self._home(family, tokens)
        unit = home // (family.coarse_size // family.cluster_size) if family.coarse_size else home
        groups: Tensor = torch.where(home < 0, -1, unit % self._scene.num_groups)
        return groups

    def ranks(
        self,
        family: Family,
        alphas: Sequence[float],
        advance: Callable[[float], None] = lambda share: None,
    ) -> Tensor:
        """Clusters of its group that go before the dense argmax's, int32 `[alphas, N]`.

        -1 for a token in no cluster; M where its coarse cluster was not kept. Ties go to the lower
        slot.

        Raises:
            ValueError: clusters that do not deal evenly, or centroids that scales do not fit.
        """
        scene, groups = self._scene, self._scene.num_groups
        tokens = scene.top_tokens[:, 0]
        leaves = self._level(family, family.cluster_size)
        coarse = self._level(family, family.coarse_size) if family.coarse_size else None
        children = family.coarse_size // family.cluster_size if family.coarse_size else 1
        units = len(leaves.centroids) // children
        if len(leaves.centroids) % (children * groups):
            raise ValueError(f"{len(leaves.centroids)} clusters do not deal over {groups} groups")
        unit_ids = deal(torch.arange(units), groups)
        home = self._home(family, tokens)
        group_of = self.home_groups(family, tokens)
        ranks = torch.full((len(alphas), len(tokens)), -1, dtype=torch.int32)
        for group in range(groups):
            own_units = unit_ids[group]
            clusters = (own_units[:, None] * children + torch.arange(children)).flatten()
            slot_of = torch.full((len(leaves.centroids),), -1)
            slot_of[clusters] = torch.arange(len(clusters))
            members = torch.nonzero(group_of == group).flatten()
            for rows in torch.split(members, _CHUNK_STATES):
                own = slot_of[home[rows]]
                found = leaves.scores(rows, clusters, alphas)
                if coarse is not None:
                    of_units = coarse.scores(rows, own_units, alphas)
                    found = _among_kept(found, of_units, family.kept_share, children)
                for place, scores in enumerate(found):
                    ranks[place, rows] = _ranks_of(scores, own)
            advance(1 / groups)
        return ranks

    def _home(self, family: Family, tokens: Tensor) -> Tensor:
        ids = self.clusters(family.cluster_size).token_ids
        home = torch.full((len(self._scene.weights),), -1, dtype=torch.int64)
        real = ids >= 0
        home[ids[real]] = torch.arange(len(ids)).unsqueeze(1).expand_as(ids)[real]
        found: Tensor = home[tokens]
        return found

    def _level(self, family: Family, cluster_size: int) -> _Level:
        described = self.clusters(cluster_size)
        key = (cluster_size, family.centroid_bits, family.group_size, family.centroid_columns)
        if key not in self._rounded_last:
            while len(self._rounded_last) >= _KEPT_ROUNDED:
                self._rounded_last.pop(next(iter(self._rounded_last)))
            self._rounded_last[key] = self._rounded(described, family)
        centroids, states, spread = self._rounded_last[key]
        norms = self._norms
        empty = (described.token_ids < 0).all(1)

        def deviations(rows: Tensor, clusters: Tensor) -> Tensor:
            product: Tensor = norms[rows, None] * spread[clusters].clamp(min=0)
            return product

        blocks = family.second_order == "blocks"
        chosen = self._block_deviations(described) if blocks else deviations
        return _Level(centroids, states, empty, chosen)

    def _rounded(self, described: Described, family: Family) -> tuple[Tensor, Tensor, Tensor]:
        """Centroids `[C, m]` and spread `[C]` as stored, states `[N, m]` as the kernels round them.

        In the order: centroids, states, spread.
        """
        scene = self._scene
        centroids, states, moment = described.centroids, scene.states.float(), scene.moment
        bits, group_size = family.centroid_bits, family.group_size
        projection = None
        if family.centroid_columns < centroids.shape[1]:
            real = (described.token_ids >= 0).any(1)
            mean, covariance = centroid_covariance(centroids[real])
            axes = leading_axes(covariance, moment, family.centroid_columns)
            projection = Projection(axes.to_state.T.contiguous(), mean)
            centroids = (centroids - mean) * real.unsqueeze(1) @ axes.to_centroid
            states = states @ axes.to_state
            moment = None if moment is None else axes.moment(moment)
        if bits == 16 or moment is None:
            stored = quantize_centroids(centroids, bits, group_size).dequantize()
        else:
            stored = quantize_for_states(centroids, moment, bits, group_size).dequantize()
        if bits < 16:
            integers, scales = quantize_hidden_states(states, group_size)
            states = integers * scales.repeat_interleave(group_size, dim=1)
        spread = described.spread
        if projection is not None:
            spread = with_left_out(spread, described.centroids, stored, projection, scene.moment)
        return stored, states, spread

    def _block_deviations(self, described: Described) -> Callable[[Tensor, Tensor], Tensor]:
        """Root of the sum over blocks of axes of |h_b|^2 times a row's mean square along an axis.

        A bound on a cluster that looks at where a state's energy lies: axes are the eigenvectors of
        the states' second moment, and of a cluster's rows the one that strays most counts.
        """
        scene = self._scene
        moment = torch.eye(scene.weights.shape[1]) if scene.moment is None else scene.moment
        axes = torch.linalg.eigh(moment)[1].flip(1).float()
        edges = [edge for edge in BLOCK_EDGES if edge < len(axes)]
        energies = _block_sums((scene.states.float() @ axes).square(), edges)
        blocks = torch.zeros(len(described.token_ids), len(edges))
        sizes = torch.tensor([*edges[1:], len(axes)]) - torch.tensor(edges)
        for part in torch.split(torch.arange(len(blocks)), _CHUNK_CLUSTERS):
            ids = described.token_ids[part]
            rows = scene.weights[ids.clamp(min=0)].float() - described.centroids[part].unsqueeze(1)
            strays = _block_sums(((rows * (ids >= 0).unsqueeze(2)) @ axes).square(), edges)
            blocks[part] = strays.amax(1) / sizes
        return lambda rows, clusters: (energies[rows] @ blocks[clusters].T).sqrt()


def _among_kept(
    leaves: Iterator[Tensor], coarse: Iterator[Tensor], share: float, children: int
) -> Iterator[Tensor]:
    """Scores `[n, M]` of leaves, -inf but for children of the best `share` of coarse clusters."""
    for scores, of_units in zip(leaves, coarse, strict=True):
        count = max(1, round(share * of_units.shape[1]))
        best = of_units.topk(count, dim=1).indices
        kept = torch.zeros_like(of_units, dtype=torch.bool).scatter_(1, best, True)
        yield scores.masked_fill(~kept.repeat_interleave(children, dim=1), float("-inf"))


def _ranks_of(scores: Tensor, own: Tensor) -> Tensor:
    """Slots `[n, M]` that go before slot `own [n]`; M where its score is -inf."""
    mine = scores.gather(1, own.unsqueeze(1))
    slots = torch.arange(scores.shape[1])
    before = ((scores > mine) | ((scores == mine) & (slots < own.unsqueeze(1)))).sum(1)
    return torch.where(mine[:, 0] == float("-inf"), scores.shape[1], before).to(torch.int32)


def _block_sums(values: Tensor, edges: Sequence[int]) -> Tensor:
    """Sums `[..., B]` of `values [..., D]` over the blocks that start at `edges`."""
    ends = [*edges[1:], values.shape[-1]]
    parts = [values[..., a:b].sum(-1) for a, b in zip(edges, ends, strict=True)]
    return torch.stack(parts, dim=-1)
