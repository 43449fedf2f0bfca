"""Rows of logits for callers that want one value for every token of the vocabulary.

A retrieval head scores R candidates exactly and knows of every other token only its cluster. Two
kinds of rows follow, both of final logits (soft-capped and scaled as the model has it):

    estimated    candidates exact; every token of an unprobed cluster has that cluster's mean logit,
                 so that the cluster as a whole has its estimated mass
    closed form  candidates exact; an unprobed cluster keeps its estimated mass, shared out among
                 its tokens by their exact logits, which costs as much as a dense head

Letters: `n` rows, `V` vocabulary, `D` hidden size, `K` clusters of `S` tokens, `T` temperature.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from flashhead_dist.heads.flashhead import FlashHead
from flashhead_kernels.dispatch import ops_for
from flashhead_kernels.logits import PLAIN, FinalLogits, OutputBias

_GROUPS_AT_ONCE = 8
"""Probing groups whose rows are held in float32 while every token is scored."""


@dataclass(frozen=True)
class Retrieved:
    """What the head knows of `hidden_states [n, D]`.

    cluster_ids: int64 `[n, q]`, probed. token_ids: int64 `[n, R]`, V for a pad; logits: float32
    `[n, R]`, final. means: float32 `[n, K]`, the final logit of each cluster's mean; -inf for a
    cluster without tokens.
    """

    hidden_states: Tensor
    cluster_ids: Tensor
    token_ids: Tensor
    logits: Tensor
    means: Tensor


class LogitRows:
    """Makes rows `[n, V]` of hidden states `[n, D]` with one head at tp_size 1."""

    def __init__(
        self, head: FlashHead, final: FinalLogits = PLAIN, bias: OutputBias | None = None
    ) -> None:
        self.head = head
        self.final = final
        self.bias = bias
        self.vocab_size = head.vocab_size
        shard = head.shard
        self._rows = shard.rows.flatten(0, 1)  # [K, S, D]
        self._token_ids = shard.token_ids.flatten(0, 1).long()  # [K, S]
        self._token_ids[self._token_ids < 0] = self.vocab_size
        pinned = shard.pinned_token_ids.flatten().long()
        self._pinned_ids = pinned.masked_fill(pinned < 0, self.vocab_size)
        self._log_counts = (shard.token_ids >= 0).sum(-1).flatten().float().log()  # [K]

    @cached_property
    def cluster_of_token(self) -> Tensor:
        """int64 `[V + 1]`: the cluster of each token; K for a pinned one and for pads."""
        clusters, size = self._token_ids.shape
        found = self._token_ids.new_full((self.vocab_size + 1,), clusters)
        owners = torch.arange(clusters, device=found.device).repeat_interleave(size)
        found[self._token_ids.flatten()] = owners
        found[self.vocab_size] = clusters
        return found

    def choose(self, hidden_states: Tensor) -> Tensor:
        """The head's own greedy tokens int64 `[n]`.

        Raises:
            UserError: NaN or inf in a hidden state.
        """
        if self.bias is None:
            return self.head(hidden_states).token_ids[:, 0]
        found = self.retrieve(hidden_states)
        best = found.logits.amax(1, keepdim=True)
        ties = found.token_ids.masked_fill(found.logits < best, self.vocab_size)
        return ties.amin(1)

    def retrieve(self, hidden_states: Tensor) -> Retrieved:
        """Probe, and score the candidates."""
        head, shard = self.head, self.head.shard
        ops: Any = ops_for(hidden_states.device)
        means = ops.score_centroids(hidden_states, shard.centroids, shard.spread, 0.0)
        scores = means
        if head.alpha:
            scores = ops.score_centroids(hidden_states, shard.centroids, shard.spread, head.alpha)
        if self.bias is not None:
            means, scores = means + self.bias.clusters, scores + self.bias.clusters
        probes = ops.select_probes(scores, -(-head.num_probes // head.num_groups))
        groups, clusters = scores.shape[1:]
        first = torch.arange(groups, dtype=torch.int32, device=scores.device) * clusters
        cluster_ids = (probes + first[:, None]).flatten(1)
        token_ids = self._token_ids[cluster_ids.long()].flatten(1)
        logits = ops.score_rows(hidden_states, self._rows, cluster_ids).flatten(1)
        if self.bias is not None:
            logits = logits + self.bias.rows.flatten(0, 1)[cluster_ids.long()].flatten(1)
        if len(self._pinned_ids):
            every = torch.arange(groups, dtype=torch.int32, device=scores.device)
            every = every.expand(len(hidden_states), -1).contiguous()
            pinned = ops.score_rows(hidden_states, shard.pinned_rows, every).flatten(1)
            if self.bias is not None:
                pinned = pinned + self.bias.pinned.flatten()
            logits = torch.cat([logits, pinned], dim=1)
            token_ids = torch.cat([token_ids, self._pinned_ids.expand(len(logits), -1)], dim=1)
        logits = logits.masked_fill(token_ids == self.vocab_size, float("-inf"))
        return Retrieved(
            hidden_states,
            cluster_ids.long(),
            token_ids,
            self.final.without_noise(logits),
            self.final.without_noise(means.flatten(1)),
        )

    def estimated(self, found: Retrieved, temperature: float, *, below_best: bool) -> Tensor:
        """Estimated rows float32 `[n, V]`.

        below_best: hold tokens that were not scored below the best candidate, so that the greatest
            value of a row is the head's own greedy token.
        """
        means = self._mean_logits(found, temperature)
        if below_best:
            best = found.logits.amax(1, keepdim=True)
            means = torch.minimum(means, best - 1e-6 * (1 + best.abs()))
        padded = torch.nn.functional.pad(means, (0, 1), value=float("-inf"))
        rows = padded[:, self.cluster_of_token]
        return rows.scatter_(1, found.token_ids, found.logits)[:, : self.vocab_size]

    def closed_form(self, found: Retrieved, temperature: float) -> Tensor:
        """Rows float32 `[n, V]` whose softmax at `temperature` is the closed form there."""
        count = len(found.hidden_states)
        logits = self._every_logit(found.hidden_states)  # [n, K, S]
        share = self._log_shares(found, logits, temperature)
        share.scatter_(1, found.cluster_ids, 0.0)
        rows = logits.new_full((count, self.vocab_size + 1), float("-inf"))
        rows.scatter_(
            1,
            self._token_ids.flatten().expand(count, -1),
            (logits + share.unsqueeze(-1)).flatten(1),
        )
        return rows.scatter_(1, found.token_ids, found.logits)[:, : self.vocab_size]

    def open_clusters(
        self, found: Retrieved, row: int, clusters: Tensor, temperature: float | None
    ) -> tuple[Tensor, Tensor]:
        """Tokens int64 `[s]` of `clusters [c]` and their logits float32 `[s]` in one row.

        temperature: share out each cluster's estimated mass there, as `closed_form` does; None for
            the exact logits.
        """
        ops: Any = ops_for(found.hidden_states.device)
        hidden = found.hidden_states[row : row + 1]
        logits = ops.score_rows(hidden, self._rows, clusters.to(torch.int32).unsqueeze(0))[0]
        if self.bias is not None:
            logits = logits + self.bias.rows.flatten(0, 1)[clusters]
        token_ids = self._token_ids[clusters]  # [c, S]
        real = token_ids < self.vocab_size
        logits = self.final.without_noise(logits).masked_fill(~real, float("-inf"))
        if temperature is not None:
            means = self._mean_logits(found, temperature)[row, clusters] / temperature
            mass = means + self._log_counts[clusters]
            share = temperature * (mass - (logits / temperature).logsumexp(-1))
            logits = logits + share.unsqueeze(-1)
        return token_ids[real], logits[real]

    def _mean_logits(self, found: Retrieved, temperature: float) -> Tensor:
        """float32 `[n, K]`: T times the log of a cluster's estimated mass a token at T."""
        return found.means

    def _log_shares(self, found: Retrieved, logits: Tensor, temperature: float) -> Tensor:
        """T times the log of estimated over true mass, float32 `[n, K]`; 0 without tokens."""
        true = (logits / temperature).logsumexp(-1)
        mass = self._mean_logits(found, temperature) / temperature + self._log_counts
        return torch.where(true.isneginf(), 0.0, temperature * (mass - true))

    def _every_logit(self, hidden_states: Tensor) -> Tensor:
        """Final logits float32 `[n, K, S]`, -inf for pads."""
        rows = self.head.shard.rows  # [N, M, S, D]
        hidden = hidden_states.float()
        parts = [
            hidden @ rows[first : first + _GROUPS_AT_ONCE].flatten(0, 2).float().T
            for first in range(0, len(rows), _GROUPS_AT_ONCE)
        ]
        logits = torch.cat(parts, dim=1).view(len(hidden), *self._token_ids.shape)
        if self.bias is not None:
            logits = logits + self.bias.rows.flatten(0, 1)
        logits = self.final.without_noise(logits)
        return logits.masked_fill_(self._token_ids == self.vocab_size, float("-inf"))
