"""FlashHead over tensor-parallel ranks: probing in fixed groups, and its variants.

The index assigns its clusters to G probing groups, each of which probes its own share, and a rank
holds whole groups. The set of candidates is therefore the same at every tp_size. On a CPU the
kernels score each centroid and row in an order that does not depend on what else the rank holds:
token ids and logits are equal bit for bit at every tp_size. On other devices torch's GEMM scores
the centroids, so there a probe whose score ties within rounding may differ. The log-sum-exp agrees
within the rounding of the ranks' float32 partials (see `merge_candidates`).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from math import isfinite
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from flashhead_dist.errors import UserError
from flashhead_dist.heads.base import (
    Head,
    HeadOutput,
    HeadShape,
    HeadStyle,
    Want,
    keys_sent,
    launches,
    local_output,
    merge_candidates,
    merge_scanned,
    share_of,
)
from flashhead_dist.heads.dense import IndexScan
from flashhead_dist.index import LoadedShard
from flashhead_dist.parallel import Exchange, Operation, Steps, TensorParallel
from flashhead_kernels.dispatch import ops_for
from flashhead_kernels.keys import pack_keys, unpack_keys
from flashhead_kernels.shard import Candidates, Query
from flashhead_profiles.ranges import CANDIDATES, CENTROIDS, annotate, in_parts
from flashhead_topology.cost import HeadWork, Part, Sent

if TYPE_CHECKING:
    from flashhead_dist.heads.registry import HeadBuilder

_BATCH_OF_ONE_LAUNCH = 8
"""Rows up to which the CUDA head takes one launch: `flashhead_kernels.triton_shapes`."""
_SCORE_BYTES = _ID_BYTES = _SPREAD_BYTES = 4


class IndexHead(Head):
    """A head over a rank's part of an index: `N` groups of `M` clusters of `S` rows."""

    needs_index: ClassVar[bool] = True
    holds_rows: ClassVar[bool] = True

    def __init__(
        self, tp: TensorParallel, index: LoadedShard, *, num_probes: int, alpha: float
    ) -> None:
        """num_probes: clusters probed in all, over every rank; alpha: see `score_centroids`.

        Raises:
            UserError: num_probes outside 1..C, or an alpha that is not finite.
        """
        manifest, self.shard = index.manifest, index.shard
        if not 1 <= num_probes <= manifest.num_clusters:
            raise UserError(
                f"num_probes {num_probes} must lie between 1 and the index's "
                f"{manifest.num_clusters} clusters: choose a number in that range"
            )
        if not isfinite(alpha):
            raise UserError(f"alpha {alpha} is not finite: 1 is usual, 0 leaves spread out")
        size = self.shard.rows.element_size()
        super().__init__(tp, HeadShape.of_index(manifest, num_probes=num_probes, row_bytes=size))
        self.index = index
        self.num_groups = manifest.num_groups
        self.num_probes = num_probes
        self.alpha = alpha

    @property
    def weight_bytes(self) -> int:
        return self.shard.weight_bytes

    @classmethod
    def load(cls, builder: HeadBuilder, num_probes: int | None, alpha: float | None) -> Head:
        return cls(builder.tp, builder.index_shard, **builder.probing(num_probes, alpha))

    @classmethod
    def split_limit(cls, shape: HeadShape) -> tuple[int, str]:
        return min(shape.num_groups, shape.vocab_size), "probing groups"

    def embedding_steps(self, token_ids: Tensor) -> Steps[Tensor]:
        return (yield Exchange(Operation.SUM, self.index.embedding_lookup(token_ids)))

    def probed_logsumexp(self, hidden_states: Tensor, cluster_ids: Tensor) -> Tensor:
        """Log-sum-exp float32 `[B]` over the tokens of local `cluster_ids [B, n]` and the pinned.

        A cluster id of -1 is none. For evaluation: it scores rows that the head has scored already.
        """
        ops = ops_for(hidden_states.device)
        shard, batch = self.shard, hidden_states.shape[0]
        logits = ops.score_rows(hidden_states, shard.cluster_rows, cluster_ids).flatten(1)
        ids = shard.cluster_token_ids[cluster_ids.clamp(min=0).long()].flatten(1)
        groups = torch.arange(shard.pinned_rows.shape[0], dtype=torch.int32, device=logits.device)
        if shard.pinned_rows.shape[1]:
            every = groups.expand(batch, -1).contiguous()
            pinned = ops.score_rows(hidden_states, shard.pinned_rows, every)
            logits = torch.cat([logits, pinned.flatten(1)], dim=1)
            ids = torch.cat([ids, shard.pinned_token_ids.flatten().expand(batch, -1)], dim=1)
        summed: Tensor = logits.masked_fill(ids < 0, float("-inf")).logsumexp(1)
        return summed


class FlashHead(IndexHead):
    """Each group probes its share of `num_probes` (rounded up); one exchange of packed candidates.

    The wire carries 8 bytes a row in greedy decoding.
    """

    name: ClassVar[str] = "flashhead"
    style: ClassVar[HeadStyle] = HeadStyle("#0072B2", "*", zorder=2.5)
    samples: ClassVar[bool] = True

    @classmethod
    def work(cls, shape: HeadShape, tp_size: int, batch: int = 1, tp_rank: int = 0) -> HeadWork:
        groups = share_of(shape.num_groups, tp_size, tp_rank)
        probes = -(-shape.num_probes // shape.num_groups) * groups
        fused = 1 if batch <= _BATCH_OF_ONE_LAUNCH else 2
        work = _index_work(shape, groups, probes, batch)
        return replace(work, launches=launches(fused, 1, unpacks=True))

    @property
    def sampling_probes(self) -> int:
        """Clusters probed, over every rank, where a token is drawn or its probability asked for.

        Half as many again as for the best token, whose cluster scores high: a draw falls on others
        too, and what is not scored has an estimated probability (docs/concepts/distribution.md has
        figures).
        """
        return min(-(-3 * self.num_probes // 2), self.index.manifest.num_clusters)

    def steps(self, hidden_states: Tensor, want: Want) -> Steps[HeadOutput]:
        found, mass = self._find(hidden_states, want)
        return (yield from merge_candidates(found, mass))

    def _find(
        self,
        hidden_states: Tensor,
        want: Want,
        *,
        num_probes: int | None = None,
        need_unprobed: bool = False,
    ) -> tuple[Candidates, Tensor | None]:
        """This rank's candidates with `num_probes` (this head's where None), and the log-sum-exp
        `[B]` over them where the candidates' mass is wanted.
        """
        per_group = -(-(num_probes or self.num_probes) // self.num_groups)
        ops = ops_for(hidden_states.device)
        with in_parts(CENTROIDS, CANDIDATES) as next_part:
            query = Query(per_group, self.alpha, want.k, want.logsumexp, need_unprobed)
            found = ops.candidates(hidden_states, self.shard, query, between=next_part)
        if not want.candidate_mass:
            return found, None
        scores = ops.score_centroids(hidden_states, self.shard, self.alpha)
        probes = ops.select_probes(scores, per_group)
        groups, clusters = scores.shape[1:]
        first = torch.arange(groups, dtype=torch.int32, device=scores.device) * clusters
        cluster_ids = (probes + first[:, None]).flatten(1)
        return found, self.probed_logsumexp(hidden_states, cluster_ids)


class FlashHeadReplicated(FlashHead):
    """Every rank holds the whole index and does all the work; nothing on the wire.

    What a FlashHead made for one GPU does under tensor parallelism.
    """

    name: ClassVar[str] = "flashhead_replicated"
    style: ClassVar[HeadStyle] = HeadStyle("#56B4E9", "v")
    sharded: ClassVar[bool] = False

    @classmethod
    def load(cls, builder: HeadBuilder, num_probes: int | None, alpha: float | None) -> Head:
        return cls(builder.tp, builder.unsharded_index, **builder.probing(num_probes, alpha))

    @classmethod
    def work(cls, shape: HeadShape, tp_size: int, batch: int = 1, tp_rank: int = 0) -> HeadWork:
        return replace(super().work(shape, 1, batch), exchanges=())

    def embedding_steps(self, token_ids: Tensor) -> Steps[Tensor]:
        yield from ()
        return self.index.embedding_lookup(token_ids)

    def steps(self, hidden_states: Tensor, want: Want) -> Steps[HeadOutput]:
        yield from ()
        found, mass = self._find(hidden_states, want)
        return local_output(found, mass)


def scans_at(changes_at: Sequence[int], batch_size: int) -> bool:
    """Whether a head with these `changes_at` scans a batch of this size."""
    return bisect_right(changes_at, batch_size) % 2 == 1


class FlashHeadAuto(FlashHead):
    """Retrieves small batches, and scans the whole shard for large ones.

    Rows of a batch probe different clusters, so what retrieval reads grows with the batch while a
    scan reads the shard once. From some batch size on the scan is faster; where depends on shapes
    and device and is measured (`bench.crossover`). It may change back: both ways take other kernels
    for larger batches. The scan runs over the index's own rows and gives the dense head's tokens.

    From `changes_at[0]` rows on it scans, from `changes_at[1]` on it retrieves, and so on. Every
    rank must hold the same `changes_at`, ascending. Both ways take the same one exchange.
    """

    name: ClassVar[str] = "flashhead_auto"
    style: ClassVar[HeadStyle] = HeadStyle("#8B1A1A", "h")
    samples: ClassVar[bool] = False
    changes_at: tuple[int, ...] = ()

    @classmethod
    def work(cls, shape: HeadShape, tp_size: int, batch: int = 1, tp_rank: int = 0) -> HeadWork:
        work = super().work(shape, tp_size, batch, tp_rank)
        scan = IndexScan.work(shape, tp_size, batch, tp_rank)
        return replace(work, scan=replace(scan, weight_bytes=work.weight_bytes))

    def scans(self, batch_size: int) -> bool:
        """Whether a batch of this size is scanned."""
        return scans_at(self.changes_at, batch_size)

    def steps(self, hidden_states: Tensor, want: Want) -> Steps[HeadOutput]:
        if not self.scans(hidden_states.shape[0]):
            return (yield from super().steps(hidden_states, want))
        mass = Want(want.k, want.logsumexp or want.candidate_mass)
        found = self.scan(hidden_states, mass)
        return (yield from merge_scanned(found, want))

    def retrieve(self, hidden_states: Tensor, want: Want) -> Candidates:
        """This rank's candidates of `hidden_states [B, D]`, by retrieval."""
        return self._find(hidden_states, want)[0]

    def scan(self, hidden_states: Tensor, want: Want) -> Candidates:
        """This rank's candidates of `hidden_states [B, D]`, by scoring every token it holds."""
        return self._scan.candidates(hidden_states, want)

    def read_bytes_per_step(self, batch_size: int) -> int:
        if not self.scans(batch_size):
            return super().read_bytes_per_step(batch_size)
        return self._scan.read_bytes_per_step(batch_size)

    @cached_property
    def _scan(self) -> IndexScan:
        return IndexScan(self.tp, self.index)


class FlashHeadGlobal(IndexHead):
    """Probes the `num_probes` best clusters of the whole index: what local probing saves and costs.

    Two exchanges a step: centroid scores (gathered, `4 C` bytes a row and more where groups do not
    divide evenly), then packed candidates. Every rank chooses the same probes, by score and then by
    cluster id in tree order, so ids and logits are equal at every tp_size as `flashhead`'s are.
    """

    name: ClassVar[str] = "flashhead_global"
    style: ClassVar[HeadStyle] = HeadStyle("#009E73", "^")
    capturable: ClassVar[bool] = False

    def __init__(
        self, tp: TensorParallel, index: LoadedShard, *, num_probes: int, alpha: float
    ) -> None:
        super().__init__(tp, index, num_probes=num_probes, alpha=alpha)
        self._clusters_per_group = self.shard.rows.shape[1]
        clusters = self.num_groups * self._clusters_per_group
        self._tree_ids = torch.arange(clusters, device=self.shard.rows.device)

    @classmethod
    def work(cls, shape: HeadShape, tp_size: int, batch: int = 1, tp_rank: int = 0) -> HeadWork:
        groups = share_of(shape.num_groups, tp_size, tp_rank)
        # An even share of the probes; a row's best clusters may lie otherwise.
        work = _index_work(shape, groups, -(-shape.num_probes * groups // shape.num_groups), batch)
        widest = share_of(shape.num_groups, tp_size)
        scores = widest * (shape.num_clusters // shape.num_groups) * batch * _SCORE_BYTES
        result = Part(0.0, 0.0, scratch_bytes=2.0 * scores * tp_size)
        return replace(
            work,
            parts={**work.parts, "head/result": result},
            exchanges=(Sent("all_gather", scores, _SCORE_BYTES), *work.exchanges),
            # Kernels score centroids and rows; the choice among all ranks' scores is plain torch.
            launches=launches(96, 50 + (batch > 1), unpacks=True),
        )

    def steps(self, hidden_states: Tensor, want: Want) -> Steps[HeadOutput]:
        ops = ops_for(hidden_states.device)
        with annotate(CENTROIDS):
            scores = ops.score_centroids(hidden_states, self.shard, self.alpha)
            padding = self._widest() - scores.shape[1]
            if padding:
                scores = functional.pad(scores, (0, 0, 0, padding), value=float("-inf"))
        gathered = yield Exchange(Operation.GATHER, scores)  # [P, B, widest, M]
        with annotate(CANDIDATES):
            cluster_ids = self._choose(gathered)
            best = self._best_keys(hidden_states, cluster_ids, want.k)
        probed = None
        if want.logsumexp or want.candidate_mass:
            probed = self.probed_logsumexp(hidden_states, cluster_ids)
        estimate = None
        if want.logsumexp and probed is not None:
            estimate = torch.logaddexp(probed, self._unprobed(hidden_states, cluster_ids))
        mass = probed if want.candidate_mass else None
        return (yield from merge_candidates(Candidates(best, estimate), mass))

    def _best_keys(self, hidden_states: Tensor, cluster_ids: Tensor, k: int) -> Tensor:
        """Keys int64 `[B, k]` of this rank's probes int32 `[B, n]` and pinned tokens."""
        shard, ops = self.shard, ops_for(hidden_states.device)
        keys = [ops.probed_candidates(
            hidden_states, shard.cluster_rows, shard.cluster_token_ids, cluster_ids, k=k
        )]  # fmt: skip
        if shard.pinned_rows.shape[1]:
            groups = torch.arange(shard.rows.shape[0], dtype=torch.int32, device=cluster_ids.device)
            keys.append(ops.probed_candidates(
                hidden_states, shard.pinned_rows, shard.pinned_token_ids,
                groups.expand(hidden_states.shape[0], -1).contiguous(), k=k,
            ))  # fmt: skip
        return torch.cat(keys, dim=1).topk(k, dim=1).values

    def _widest(self) -> int:
        """Groups on the rank that holds most."""
        return -(-self.num_groups // self.tp.tp_size)

    def _choose(self, gathered: Tensor) -> Tensor:
        """This rank's probes int32 `[B, n]` among `gathered [P, B, widest, M]` scores, -1 for none.

        Group g is the (g // P)-th of rank g mod P, and its slot t the tree's cluster t * G + g.
        """
        tp_size, groups = self.tp.tp_size, self.num_groups
        by_group = gathered.permute(1, 2, 0, 3).flatten(1, 2)[:, :groups]  # [B, G, M]
        by_tree = by_group.transpose(1, 2).flatten(1)  # [B, C]
        keys = pack_keys(by_tree, self._tree_ids.expand(by_tree.shape))
        _, tree_ids = unpack_keys(keys.topk(self.num_probes, dim=1).values)
        group, slot = tree_ids % groups, tree_ids // groups
        local = (group // tp_size) * self._clusters_per_group + slot
        none = self.shard.cluster_rows.shape[0]
        local = torch.where(group % tp_size == self.tp.tp_rank, local, none).sort(dim=1).values
        most = int((local < none).sum(1).max())
        local = local[:, : max(most, 1)]
        return torch.where(local == none, -1, local).to(torch.int32).contiguous()

    def _unprobed(self, hidden_states: Tensor, cluster_ids: Tensor) -> Tensor:
        """`log sum tokens * exp(h . centroid)` float32 `[B]` over this rank's unprobed clusters."""
        scores = ops_for(hidden_states.device).score_centroids(hidden_states, self.shard, 0.0)
        estimates = scores.flatten(1) + self.shard.num_tokens.flatten().float().log()
        # A last column takes what the -1 of no cluster strikes out.
        estimates = functional.pad(estimates, (0, 1), value=float("-inf"))
        index = torch.where(cluster_ids < 0, estimates.shape[1] - 1, cluster_ids).long()
        summed: Tensor = estimates.scatter(1, index, float("-inf")).logsumexp(1)
        return summed


def _index_work(shape: HeadShape, groups: int, probes: int, batch: int) -> HeadWork:
    """The work of a rank with `groups` probing groups, of which each row takes `probes` clusters.

    Launches are left to the head.
    """
    clusters = groups * (shape.num_clusters // shape.num_groups)
    probed = min(batch * probes, clusters)
    row = shape.row_bytes + _ID_BYTES
    pinned = groups * shape.pinned_per_group
    columns = shape.centroid_columns or shape.hidden_size
    projected = shape.centroid_columns * shape.hidden_size
    centroids = clusters * (shape.centroid_bytes + _SPREAD_BYTES) + shape.projection_bytes
    scored = batch * (probes * shape.cluster_size + pinned)
    parts = {
        "head/centroids": Part(centroids, 2.0 * batch * (clusters * columns + projected)),
        "head/candidates": Part(
            probed * shape.cluster_size * row + pinned * row,
            2.0 * scored * shape.hidden_size,
            gathered=True,
        ),
    }
    held = centroids + (clusters * shape.cluster_size + pinned) * row
    return HeadWork(parts, (keys_sent(batch),), {}, held)
