"""Rows of logits for callers that want one value for every token of the vocabulary.

A retrieval head scores R candidates exactly and knows of every other token only its cluster. Two
kinds of rows follow, both of final logits (soft-capped where the model does that):

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

from flashhead_dist.heads.distribution import retrieve
from flashhead_dist.heads.flashhead import FlashHead
from flashhead_kernels.dispatch import ops_for, sampling_ops_for
from flashhead_kernels.noise import PLAIN, FinalLogits


@dataclass(frozen=True)
class RowParts:
    """What the head knows of `hidden_states [n, D]`.

    token_ids: int64 `[n, R]` of the candidates, V for a pad; logits: float32 `[n, R]`, final, -inf
    for a pad. log_mass: float32 `[n, K]`, of each unprobed cluster at `temperature`; -inf where
    probed.
    """

    hidden_states: Tensor
    temperature: float
    token_ids: Tensor
    logits: Tensor
    log_mass: Tensor


class LogitRows:
    """Makes rows `[n, V]` of hidden states `[n, D]` with one head at tp_size 1."""

    def __init__(self, head: FlashHead, final: FinalLogits = PLAIN) -> None:
        self.head = head
        self.final = final
        self.vocab_size = head.vocab_size
        shard = head.shard
        self._rows = shard.cluster_rows  # [K, S, D]
        self._token_ids = shard.cluster_token_ids.long()  # [K, S]
        self._token_ids[self._token_ids < 0] = self.vocab_size
        self._counts = (shard.token_ids >= 0).sum(-1)  # [N, M]

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
        return self.head(hidden_states).token_ids[:, 0]

    def retrieve(
        self, hidden_states: Tensor, temperature: float = 1.0, *, greedy: bool = False
    ) -> RowParts:
        """Probe, score the candidates, and estimate the mass of every other cluster.

        greedy: probe as for the head's own greedy token, not as for a draw.
        """
        head = self.head
        num_probes = head.num_probes if greedy else head.sampling_probes
        final = FinalLogits(self.final.softcap, temperature * self.final.temperature)
        found = retrieve(head, hidden_states, final, num_probes)
        ids = found.token_ids.long()
        return RowParts(
            hidden_states,
            temperature,
            ids.masked_fill(ids < 0, self.vocab_size),
            self.final.without_noise(found.products),
            found.log_mass.flatten(1),
        )

    def estimated(self, found: RowParts, *, below_best: bool) -> Tensor:
        """Estimated rows float32 `[n, V]`; their softmax at found's temperature is that of the
        closed form, the tokens of an unprobed cluster taken together.

        below_best: hold tokens that were not scored below the best candidate, so that the greatest
            value of a row is the head's own greedy token.
        """
        counts = self._counts.flatten().clamp(min=1)
        values = found.temperature * (found.log_mass - counts.float().log())
        if below_best:
            best = found.logits.amax(1, keepdim=True)
            values = torch.minimum(values, best - 1e-6 * (1 + best.abs()))
        padded = torch.nn.functional.pad(values, (0, 1), value=float("-inf"))
        rows = padded.index_select(1, self.cluster_of_token)
        return rows.scatter_(1, found.token_ids, found.logits)[:, : self.vocab_size]

    def closed_form(self, found: RowParts) -> Tensor:
        """Rows float32 `[n, V]` whose softmax at found's temperature is the closed form there."""
        count = len(found.hidden_states)
        logits = self._every_logit(found.hidden_states)  # [n, K, S]
        logits = self._shared_out(logits, found.log_mass, found.temperature)
        rows = logits.new_full((count, self.vocab_size + 1), float("-inf"))
        rows.scatter_(1, self._token_ids.flatten().expand(count, -1), logits.flatten(1))
        return rows.scatter_(1, found.token_ids, found.logits)[:, : self.vocab_size]

    def open_clusters(
        self, found: RowParts, rows: Tensor, clusters: Tensor, *, exact: bool
    ) -> tuple[Tensor, Tensor]:
        """Score one cluster in each of some rows: tokens and logits `[q, S]`.

        rows: int64 `[q]`, of found; clusters: int64 `[q]`. Tokens are int64, V for a pad; logits
        float32, with the cluster's estimated mass as in `closed_form`, or as they are if `exact`.
        """
        ops: Any = ops_for(found.hidden_states.device)
        hidden = found.hidden_states[rows]
        logits = ops.score_rows(hidden, self._rows, clusters.to(torch.int32).unsqueeze(1))[:, 0]
        token_ids = self._token_ids[clusters]
        logits = self.final.without_noise(logits)
        logits = logits.masked_fill(token_ids == self.vocab_size, float("-inf"))
        if not exact:
            mass = found.log_mass[rows, clusters]
            logits = self._shared_out(logits, mass, found.temperature)
        return token_ids, logits

    @staticmethod
    def _shared_out(logits: Tensor, log_mass: Tensor, temperature: float) -> Tensor:
        """Shift `logits [..., c, S]` so that each cluster has its `log_mass [..., c]`.

        A cluster without an estimate, having been probed, stays as it is.
        """
        true = (logits / temperature).logsumexp(-1)
        shift = torch.where(log_mass.isneginf(), 0.0, temperature * (log_mass - true))
        return logits + shift.unsqueeze(-1)

    def _every_logit(self, hidden_states: Tensor) -> Tensor:
        """Final logits float32 `[n, K, S]`, -inf for pads."""
        ops = sampling_ops_for(hidden_states.device)
        logits = ops.every_logit(hidden_states, self.head.shard.rows)
        logits = logits.view(len(hidden_states), *self._token_ids.shape)
        logits = self.final.without_noise(logits)
        return logits.masked_fill_(self._token_ids == self.vocab_size, float("-inf"))
