"""Settle a token among rows of estimates: the last logits processor of a decoding loop.

Where the other processors would take a token whose logit is only its cluster's estimate, the
cluster is opened, its rows scored exactly, and the processors run again on the better row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from flashhead_dist.integrations.transformers_head import RowKind, Session
from flashhead_dist.integrations.transformers_rows import Retrieved

_NEVER = float("-inf")


class SettleTokens(LogitsProcessor):
    """Leaves scores whose argmax, or whose draw, is a token that was scored exactly.

    Greedy: the clusters of estimates that lead are opened until a scored token leads.
    Sampling: one draw decides between the scored tokens together and each unprobed cluster; only
    the winner's tokens are left to the draw that follows. A cluster thus wins with its estimated
    mass, and a token within it by its exact logit.
    Either way, where the processors leave few tokens (no more than were scored), all of these are
    scored first.
    """

    def __init__(self, session: Session, processors: Sequence[Any], *, one_by_one: bool) -> None:
        """one_by_one: the rows of a forward pass come singly and in order, as in assisted decoding;
        otherwise one call takes the last position of every sequence."""
        self._session = session
        self._processors: Any = LogitsProcessorList(processors)
        self._one_by_one = one_by_one

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores: float32 `[B, V]`, processed; without rows waiting for them, given back."""
        found = self._session.found
        if found is None:
            return scores
        work = _Settling(self._session, found, self._take(len(scores), found), scores)
        if self._session.kind is RowKind.CLOSED_FORM_BESIDE:
            scores = self._again(work, input_ids)
        scores = self._score_few(work, input_ids, scores)
        if self._session.greedy:
            return self._settle_greedy(work, input_ids, scores)
        return self._settle_drawn(work, input_ids, scores)

    def _take(self, count: int, found: Retrieved) -> Tensor:
        """Numbers int64 `[B]` of the rows that are settled now."""
        session, total = self._session, len(found.hidden_states)
        if self._one_by_one:
            rows = torch.tensor([session.next_row])
            session.next_row += 1
            if session.next_row == total:
                session.found = None
            return rows
        session.found = None
        length = total // count
        return torch.arange(length - 1, total, length)

    def _again(self, work: _Settling, input_ids: Tensor) -> Tensor:
        scores: Tensor = self._processors(input_ids, work.raw.clone())
        return scores

    def _score_few(self, work: _Settling, input_ids: Tensor, scores: Tensor) -> Tensor:
        left = torch.isfinite(scores) & ~work.scored
        counts = left.sum(1)
        few = (counts > 0) & (counts <= work.found.token_ids.shape[1])
        if not bool(few.any()):
            return scores
        rows, token_ids = (left & few.unsqueeze(1)).nonzero().unbind(1)
        work.open(rows, token_ids)
        return self._again(work, input_ids)

    def _settle_greedy(self, work: _Settling, input_ids: Tensor, scores: Tensor) -> Tensor:
        while True:
            best = scores.argmax(1, keepdim=True)
            missed = ~work.scored.gather(1, best) & torch.isfinite(scores.gather(1, best))
            if not bool(missed.any()):
                return scores
            rows = missed[:, 0].nonzero()[:, 0]
            work.open(rows, best[rows, 0])
            scores = self._again(work, input_ids)

    def _settle_drawn(self, work: _Settling, input_ids: Tensor, scores: Tensor) -> Tensor:
        drawn = torch.multinomial(scores.softmax(-1), 1)
        missed = ~work.scored.gather(1, drawn)[:, 0]
        settled = scores.masked_fill(~work.scored, _NEVER)
        if not bool(missed.any()):
            return settled
        rows = missed.nonzero()[:, 0]
        token_ids = work.open(rows, drawn[rows, 0])  # [q, S]
        again = self._again(work, input_ids)
        inside = torch.zeros_like(work.scored[rows]).scatter_(1, token_ids, True)
        values = again[rows].masked_fill(~inside, _NEVER)
        # A threshold may pass the estimate and cut every exact logit: it had its say.
        cut = ~torch.isfinite(values).any(1, keepdim=True)
        kept = inside & torch.isfinite(scores[rows])
        plain = work.raw[rows] / self._session.temperature
        settled[rows] = torch.where(cut & kept, plain, values)
        return settled


class _Settling:
    """Rows `[B, V]` on their way: values before the processors, and which of them are exact."""

    def __init__(self, session: Session, found: Retrieved, rows: Tensor, scores: Tensor) -> None:
        assert session.rows is not None
        self.found = found
        self._session = session
        self._rows = rows
        self.raw = session.rows[rows].to(scores.device)
        token_ids = found.token_ids[rows]
        scored = token_ids.new_zeros((len(rows), self.raw.shape[1] + 1), dtype=torch.bool)
        self.scored = scored.scatter_(1, token_ids, True)[:, :-1].to(scores.device)

    def open(self, rows: Tensor, token_ids: Tensor) -> Tensor:
        """Score the cluster of `token_ids [q]` in `rows [q]`; returns its tokens int64 `[q, S]`.

        A cluster's pads stand as its own best token.
        """
        head = self._session.head.logit_rows
        clusters = head.cluster_of_token[token_ids.to(head.cluster_of_token.device)]
        places = self._rows[rows.cpu()].to(clusters.device)
        tokens, logits = head.open_clusters(
            self.found, places, clusters, exact=self._session.greedy
        )
        pads, best = tokens == head.vocab_size, logits.argmax(1, keepdim=True)
        tokens = torch.where(pads, tokens.gather(1, best), tokens).to(self.raw.device)
        logits = torch.where(pads, logits.gather(1, best), logits).to(self.raw.device)
        self.raw[rows.unsqueeze(1), tokens] = logits
        self.scored[rows.unsqueeze(1), tokens] = True
        return tokens
