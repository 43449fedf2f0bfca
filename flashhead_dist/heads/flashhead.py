"""FlashHead over tensor-parallel ranks, probing locally in fixed groups.

The index deals its clusters into G probing groups, each of which probes its own share, and a rank
holds whole groups. The set of candidates is therefore the same at every tp_size. On a CPU the
kernels score each centroid and row in an order that does not depend on what else the rank holds:
token ids and logits are equal bit for bit at every tp_size. On other devices torch's GEMM scores
the centroids, so there a probe whose score ties within rounding may differ. The log-sum-exp agrees
within the rounding of the ranks' float32 partials (see `merge_candidates`).
"""

from __future__ import annotations

from math import isfinite
from typing import ClassVar

import torch
from torch import Tensor

from flashhead_dist.errors import UserError
from flashhead_dist.heads.base import Head, HeadOutput, Want
from flashhead_dist.heads.merge import local_output, merge_candidates
from flashhead_dist.index import LoadedShard
from flashhead_dist.parallel import Exchange, Operation, Steps, TensorParallel
from flashhead_kernels.dispatch import ops_for
from flashhead_kernels.shard import Candidates, Query
from flashhead_profiles.ranges import CANDIDATES, CENTROIDS, in_parts


class IndexHead(Head):
    """A head over a rank's part of an index: `N` groups of `M` clusters of `S` rows."""

    holds_rows: ClassVar[bool] = True

    def __init__(
        self, tp: TensorParallel, index: LoadedShard, *, num_probes: int, alpha: float
    ) -> None:
        """num_probes: clusters probed in all, over every rank; alpha: see `score_centroids`.

        Raises:
            UserError: num_probes outside 1..C, or an alpha that is not finite.
        """
        manifest = index.manifest
        super().__init__(tp, manifest.vocab_size, manifest.hidden_size)
        if not 1 <= num_probes <= manifest.num_clusters:
            raise UserError(
                f"num_probes {num_probes} must lie between 1 and the index's "
                f"{manifest.num_clusters} clusters: choose a number in that range"
            )
        if not isfinite(alpha):
            raise UserError(f"alpha {alpha} is not finite: 1 is usual, 0 leaves spread out")
        self.index = index
        self.shard = index.shard
        self.num_groups = manifest.num_groups
        self.num_probes = num_probes
        self.alpha = alpha

    @property
    def weight_bytes(self) -> int:
        return self.shard.weight_bytes

    @property
    def num_local_probes(self) -> int:
        """Clusters that one row probes on this rank."""
        return -(-self.num_probes // self.num_groups) * self.shard.rows.shape[0]

    def read_bytes_per_step(self, batch_size: int) -> int:
        """Every centroid and spread once; rows and ids of the probed clusters and pinned tokens."""
        if batch_size == 0:
            return 0
        shard = self.shard
        clusters = shard.cluster_rows.shape[0]
        probed = min(batch_size * self.num_local_probes, clusters)
        per_cluster = (shard.rows.nbytes + shard.token_ids.nbytes) // clusters
        pinned = shard.pinned_rows.nbytes + shard.pinned_token_ids.nbytes
        return shard.centroids.nbytes + shard.spread.nbytes + probed * per_cluster + pinned

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

    @property
    def sampling_probes(self) -> int:
        """Clusters probed, over every rank, where a token is drawn or its probability asked for.

        Half as many again as for the best token, whose cluster scores high: a draw falls on others
        too, and what is not scored has an estimated probability (docs/sampling.md has figures).
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

    @property
    def payload_bytes_per_row(self) -> int:
        return 0

    def embedding_steps(self, token_ids: Tensor) -> Steps[Tensor]:
        yield from ()
        return self.index.embedding_lookup(token_ids)

    def steps(self, hidden_states: Tensor, want: Want) -> Steps[HeadOutput]:
        yield from ()
        found, mass = self._find(hidden_states, want)
        return local_output(found, mass)
