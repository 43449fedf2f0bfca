"""FlashHead with probes chosen over the clusters of all ranks: what local probing saves and costs.

Two exchanges a step: centroid scores (gathered, `4 C` bytes a row and more where groups do not
divide evenly), then packed candidates. Every rank chooses the same probes, by score and then by
cluster id in tree order, so ids and logits are equal at every tp_size as those of `flashhead` are.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from flashhead_dist.heads.base import HeadOutput, Want
from flashhead_dist.heads.flashhead import IndexHead
from flashhead_dist.heads.merge import merge_candidates
from flashhead_dist.index import LoadedShard
from flashhead_dist.parallel import Exchange, Operation, Steps, TensorParallel, payload_bytes
from flashhead_kernels.dispatch import ops_for
from flashhead_kernels.keys import pack_keys, unpack_keys
from flashhead_kernels.shard import Candidates
from flashhead_profiles.ranges import CANDIDATES, CENTROIDS, annotate


class FlashHeadGlobal(IndexHead):
    """Probes the `num_probes` best clusters of the whole index, wherever they lie."""

    name: ClassVar[str] = "flashhead_global"
    capturable: ClassVar[bool] = False

    def __init__(
        self, tp: TensorParallel, index: LoadedShard, *, num_probes: int, alpha: float
    ) -> None:
        super().__init__(tp, index, num_probes=num_probes, alpha=alpha)
        self._clusters_per_group = self.shard.rows.shape[1]
        clusters = self.num_groups * self._clusters_per_group
        self._tree_ids = torch.arange(clusters, device=self.shard.rows.device)

    @property
    def num_local_probes(self) -> int:
        """An even share; a row's best clusters may lie otherwise."""
        return -(-self.num_probes * self.shard.rows.shape[0] // self.num_groups)

    @property
    def payload_bytes_per_row(self) -> int:
        operand = self._widest() * self._clusters_per_group * 4
        scores = payload_bytes(Operation.GATHER, operand, self.tp.tp_size)
        return scores + super().payload_bytes_per_row

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
