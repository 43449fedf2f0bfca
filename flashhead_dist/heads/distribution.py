"""The distribution that a head samples from, over the whole vocabulary, in closed form.

    P(t) = exp(l_t / T) / Z                                           t scored exactly
    P(t) = exp(m_c) / Z * exp(l_t / T) / sum over c of exp(l / T)     t in an unprobed cluster c
    Z    = sum of exp(l_t / T) over scored tokens + sum of exp(m_c) over unprobed clusters

with l_t the logit of t and m_c the estimated log mass of cluster c (`flashhead_kernels.sampling`).
It sums to 1 by construction, whatever the estimates are. A draw is a maximum (Gumbel-max, Maddison
et al., arXiv 1411.0030, applied level by level as in Kool et al., arXiv 1903.06059): scored tokens
and probing groups compete with noise of their own, the group that wins draws a cluster, and the
cluster is opened: its rows are scored, and the token drawn among them. A dense head scores every
token, so there the same code gives the softmax.

Letters: `B` rows, `R` scored tokens, `N` groups of `M` clusters of `S` tokens, `n` draws; all of
one rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from flashhead_dist.errors import UserError
from flashhead_dist.heads.base import Head, Want
from flashhead_dist.heads.dense import DenseLocalMax, IndexScan
from flashhead_dist.heads.flashhead import FlashHead
from flashhead_dist.heads.registry import sampling_heads
from flashhead_dist.index import LoadedShard
from flashhead_dist.models.contract import PLAIN, OutputContract
from flashhead_kernels.dispatch import ops_for, sampling_ops_for
from flashhead_kernels.noise import FinalLogits, GumbelNoise
from flashhead_kernels.sampling import Weighed
from flashhead_kernels.shard import Query
from flashhead_profiles.ranges import CANDIDATES, annotate

ScanningHead = DenseLocalMax | IndexScan
"""Heads that score every token of their rank."""
_OPEN_LOGITS = 1 << 18
"""Logits of opened clusters that are held at a time."""


@dataclass(frozen=True)
class Retrieved:
    """What one rank knows of `hidden_states [B, D]`.

    token_ids: int32 `[B, R]` of scored tokens, -1 for a pad. products: float32 `[B, R]`, of states
    and rows; logits: float32 `[B, R]`, final; both -inf for a pad. log_mass: float32 `[B, N, M]` of
    each unprobed cluster, -inf where probed.
    """

    token_ids: Tensor
    products: Tensor
    logits: Tensor
    log_mass: Tensor


@dataclass(frozen=True)
class ClosedForm:
    """One rank's part of the distribution of `hidden_states [B, D]`.

    final: soft-capping and temperature. logits: final logits float32 `[B, R]` of scored tokens,
    -inf for a pad; token_ids: int32 `[B, R]`, or `[1, R]` where all rows have the same. log_mass:
    m_c, float32 `[B, N, M]`, -inf where scored; group_log_mass: float32 `[B, N]`. index: where the
    clusters' rows are; None for a dense head, which has no clusters.
    """

    hidden_states: Tensor
    final: FinalLogits
    logits: Tensor
    token_ids: Tensor
    log_mass: Tensor
    group_log_mass: Tensor
    index: LoadedShard | None

    def log_normalizer(self) -> Tensor:
        """This rank's part of log Z, float64 `[B]`."""
        parts = torch.cat([self.logits, self.group_log_mass], dim=1)
        return parts.double().logsumexp(1)

    def draw(self, noise: GumbelNoise, row_of_draw: Tensor | None = None) -> Tensor:
        """This rank's best key int64 `[n]` of every draw; the greatest over the ranks is the token.

        row_of_draw: int64 `[n]`, which of the B rows each draw is from; None: one from each.
        noise: positions (and sequences) of the n draws.
        """
        ops, device = sampling_ops_for(self.hidden_states.device), self.logits.device
        if row_of_draw is None:
            row_of_draw = torch.arange(len(self.logits), device=device)
        noise = noise.to(device)
        if self.index is None:
            return cast(
                Tensor, ops.draw_candidates(self.logits, self.token_ids, row_of_draw, noise)
            )
        weighed = Weighed(self.logits, self.token_ids, self.log_mass, self.group_log_mass)
        keys: Tensor = ops.draw_groups(
            self.hidden_states, self.index.shard, weighed, row_of_draw,
            replace(self.final, noise=noise),
        )  # fmt: skip
        return keys

    def open(self, rows: Tensor, clusters: Tensor) -> tuple[Tensor, Tensor]:
        """Final logits float32 `[n, S]` and token ids int64 `[n, S]` (-1 pad) of a cluster each.

        rows: int64 `[n]`, of the B; clusters: int64 `[n]`, counted through this rank's groups.
        """
        assert self.index is not None
        logits = self._final_logits(self.hidden_states[rows], clusters.unsqueeze(1))[:, 0]
        return logits, self.index.shard.cluster_token_ids[clusters].long()

    def _final_logits(self, hidden_states: Tensor, clusters: Tensor) -> Tensor:
        """Final logits float32 `[n, m, S]` of clusters int64 `[n, m]`, -inf for pads."""
        assert self.index is not None
        table, token_ids = self.index.shard.cluster_rows, self.index.shard.cluster_token_ids
        device = hidden_states.device
        logits = ops_for(device).score_rows(hidden_states, table, clusters.to(torch.int32))
        final: Tensor = sampling_ops_for(device).final_logits(logits, self.final)
        return final.masked_fill(token_ids[clusters] < 0, float("-inf"))

    def token_log_mass(self, token_ids: Tensor) -> Tensor:
        """log(P(t) Z) float64 `[B]` of a token of each row; -inf where another rank holds it."""
        if self.index is None:
            others = self.token_ids != token_ids.unsqueeze(1)
            return self.logits.masked_fill(others, float("-inf")).amax(1).double()
        ops = sampling_ops_for(token_ids.device)
        rank, place = self.index.token_map.places(token_ids)
        owned = rank == self.index.tp_rank
        clusters, size = self.index.shard.cluster_token_ids.shape
        pinned = place >= clusters * size
        result = torch.full(
            token_ids.shape, float("-inf"), dtype=torch.float64, device=token_ids.device
        )
        rows = ops.some_or_all(owned & ~pinned)
        if len(rows):
            row = torch.where((owned & ~pinned)[rows], place[rows], 0)
            home = row // size
            logits, _ = self.open(rows, home)
            own = logits.gather(1, (row % size).unsqueeze(1))[:, 0].double()
            mass = self.log_mass.flatten(1)[rows, home].double()
            share = mass + own - logits.double().logsumexp(1)
            result[rows] = torch.where(mass == float("-inf"), own, share)
        rows = ops.some_or_all(owned & pinned)
        if len(rows):
            others = self.token_ids[rows] != token_ids[rows].unsqueeze(1)
            exact = self.logits[rows].masked_fill(others, float("-inf")).amax(1).double()
            result[rows] = torch.where(pinned[rows], exact, result[rows])
        return result.masked_fill(~owned, float("-inf"))

    def unnormalized(self, *, flat: bool = False) -> Tensor:
        """log(P(t) Z) float32 `[B, V]` of every token this rank holds, -inf for the others.

        At tp_size 1 its log-softmax is the closed form; at temperature 1 a scored token's number is
        its logit. Reads every row: as dear as a dense head. With `flat`, clusters stay shut and
        share their mass evenly over their tokens: cheap, right for every scored token and for every
        cluster as a whole, but not for a token of an unprobed cluster.
        """
        batch = len(self.logits)
        size = int(self.token_ids.max()) + 1
        if self.index is not None:
            size = self.index.manifest.vocab_size
        # Pads go to a column of their own.
        full = self.logits.new_full((batch, size + 1), float("-inf"))
        if self.index is not None:
            self._fill_clusters(full, flat=flat)
        ids = torch.where(self.token_ids < 0, size, self.token_ids.long()).expand(batch, -1)
        full.scatter_(1, ids, self.logits)
        return full[:, :size]

    def _fill_clusters(self, full: Tensor, *, flat: bool) -> None:
        assert self.index is not None
        ids = self.index.shard.cluster_token_ids.long()  # [K, S]
        pad = full.shape[1] - 1
        columns = torch.where(ids < 0, pad, ids)
        mass = self.log_mass.flatten(1)
        if flat:
            even = mass - (ids >= 0).sum(1).clamp(min=1).float().log()
            full[:, columns.flatten()] = even.repeat_interleave(ids.shape[1], dim=1)
            return
        chunk = max(1, _OPEN_LOGITS // (len(full) * ids.shape[1]))
        every = torch.arange(len(ids), device=ids.device)
        for part in torch.split(every, chunk):
            logits = self._final_logits(self.hidden_states, part.expand(len(full), -1))
            share = mass[:, part].unsqueeze(2) + logits.log_softmax(2)
            full[:, columns[part].flatten()] = share.flatten(1)
        full[:, pad] = float("-inf")


def closed_form(
    head: Head,
    hidden_states: Tensor,
    *,
    temperature: float = 1.0,
    contract: OutputContract = PLAIN,
) -> ClosedForm:
    """This rank's part of the distribution that `head` samples `hidden_states [B, D]` from.

    contract: what the model makes of products of states and rows.

    Raises:
        UserError: a head that does not sample, a temperature not above 0, states that do not fit.
    """
    return form_of(head, hidden_states, sampled_final(head, hidden_states, temperature, contract))


def sampled_final(
    head: Head, hidden_states: Tensor, temperature: float, contract: OutputContract
) -> FinalLogits:
    """What becomes of logits, once it is checked that `head` can sample; see `closed_form`."""
    require_sampling_head(head)
    head.check(hidden_states, Want())
    try:
        return contract.final_logits(temperature)
    except ValueError as error:
        raise UserError(str(error)) from error


def form_of(head: Head, hidden_states: Tensor, final: FinalLogits) -> ClosedForm:
    """`closed_form`, of what has been checked."""
    ops = sampling_ops_for(hidden_states.device)
    if isinstance(head, ScanningHead):
        rows, first, token_ids = _table(head)
        with annotate(CANDIDATES):
            scores = ops.dense_scores(hidden_states, rows, first)
        logits, ids = ops.final_logits(scores.logits, final), scores.token_ids
        if token_ids is not None:
            ids = token_ids.unsqueeze(0)
            logits = logits.masked_fill(ids < 0, float("-inf"))
        groups = scores.means.flatten(1)
        return ClosedForm(hidden_states, final, logits, ids, scores.means, groups, None)
    assert isinstance(head, FlashHead)
    found = retrieve(head, hidden_states, final, head.sampling_probes)
    groups = ops.group_log_mass(found.log_mass)
    return ClosedForm(
        hidden_states, final, found.logits, found.token_ids, found.log_mass, groups, head.index
    )


def retrieve(
    head: FlashHead, hidden_states: Tensor, final: FinalLogits, num_probes: int
) -> Retrieved:
    """Probe `num_probes` clusters in all, score their tokens, and estimate every other's mass."""
    ops, shard = sampling_ops_for(hidden_states.device), head.shard
    query = Query(-(-num_probes // head.num_groups), head.alpha)
    with annotate(CANDIDATES):  # one operation, centroids included
        scores = ops.local_scores(hidden_states, shard, query)
    logits = ops.final_logits(scores.logits, final)
    if final.softcap:
        # A cap makes a number of a pad's -inf.
        logits = logits.masked_fill(scores.token_ids < 0, float("-inf"))
    mass = ops.cluster_log_mass(
        hidden_states,
        shard,
        scores.means,
        ops.group_log_mass(logits.unflatten(1, (len(shard.token_ids), -1))),
        head.index.manifest.shrinkage,
        final,
    )
    return Retrieved(scores.token_ids, scores.logits, logits, mass)


def draw_scanning(head: ScanningHead, hidden_states: Tensor, final: FinalLogits) -> Tensor:
    """This rank's best key int64 `[B]` with the noise of `final`, from `hidden_states [B, D]`.

    That of the closed form's draw, without keeping a logit for every token where the device has a
    kernel that need not.
    """
    rows, first, token_ids = _table(head)
    with annotate(CANDIDATES):
        keys: Tensor = sampling_ops_for(hidden_states.device).draw_dense(
            hidden_states, rows, first, token_ids, final
        )
    return keys


def scanning_log_mass(
    head: ScanningHead, hidden_states: Tensor, tokens: Tensor, final: FinalLogits
) -> Tensor:
    """This rank's part of log(P Z) of `tokens` int64 `[B]`, and of log Z: float64 `[B, 2]`."""
    rows, first, token_ids = _table(head)
    if isinstance(head, IndexScan):
        rank, place = head.index.token_map.places(tokens)
        owned = rank == head.index.tp_rank
    else:
        place = tokens - first
        owned = (place >= 0) & (place < len(rows))
    with annotate(CANDIDATES):
        parts: Tensor = sampling_ops_for(hidden_states.device).dense_log_mass(
            hidden_states, rows, token_ids, torch.where(owned, place, -1), final
        )
    return parts


def _table(head: ScanningHead) -> tuple[Tensor, int, Tensor | None]:
    """A rank's rows `[R, D]`, the first one's token, and their tokens where these do not follow."""
    if isinstance(head, IndexScan):
        return head.rows, 0, head.token_ids
    return head.weight, head.shard.start, None


def require_sampling_head(head: Head) -> None:
    """Raise UserError unless the head's distribution has a closed form."""
    if not head.samples:
        raise UserError(
            f"head {head.name} does not sample: choose one of {', '.join(sampling_heads())}, or "
            f"temperature 0 for the best token"
        )
