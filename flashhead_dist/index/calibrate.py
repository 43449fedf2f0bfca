"""What hidden states decide about clusters: alpha, pinned tokens, shrinkage, margins, fidelity.

A state is *found* where the dense argmax is pinned or in a cluster that its group probes. The
manifest stores all of it as evidence.

N states `[N, D]`, b of them at a time; output embedding `[V, D]`; an index of G groups of M
clusters of S tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashhead_dist.index.options import ALPHAS, IndexOptions
from flashhead_dist.index.store import IndexManifest, change_manifest, load_manifest
from flashhead_dist.progress import progress
from flashhead_dist.states import HiddenStates
from flashhead_kernels.cpu import dense_candidates, matmul_is_faster, unpack_keys
from flashhead_kernels.cpu_threads import compute_threads
from flashhead_kernels.dispatch import ops_for, sampling_ops_for
from flashhead_kernels.noise import PLAIN
from flashhead_kernels.quantize import QuantizedCentroids
from flashhead_kernels.reference import centroid_dots
from flashhead_kernels.shard import IndexShard, Query

SHRINKAGES = (0.0, 0.3, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.8)
SHARES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
"""Shares of rows that escalate, for which a margin is stored."""
USUAL_SHARE = 0.02
_SHRINKAGE_STATES = 192
_MARGIN_STATES = 4096
_CHUNK_STATES = 2048
_CHUNK_TOKENS = 32768
_MATMUL_STATES = 256
_BATCH = 64

Advance = Callable[[float], None]
"""Called with the number of states or groups just finished."""


@dataclass(frozen=True)
class Found:
    """Share of states whose dense argmax is among the candidates."""

    overall: float
    by_source: dict[str, float]

    @property
    def worst_source(self) -> str:
        return min(self.by_source, key=lambda source: self.by_source[source])

    @property
    def worst(self) -> float:
        return self.by_source[self.worst_source]

    def summary(self) -> dict[str, Any]:
        """As in a manifest."""
        return {
            "top1_agreement": self.overall,
            "top1_agreement_worst_source": self.worst,
            "worst_source": self.worst_source,
        }


@dataclass(frozen=True)
class Choice:
    """What the calibration states chose, and the evidence that goes into the manifest."""

    alpha: float
    pinned_token_ids: tuple[int, ...]
    evidence: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluator:
    """Ranks right clusters for the states of an index under construction.

    weights: `[V, D]`. threads: of the dense head; everything else runs as the caller set it.
    """

    weights: Tensor
    options: IndexOptions
    threads: int
    visible: bool

    @property
    def probes_per_group(self) -> int:
        return self.options.probes_per_group(len(self.weights))

    def choose(
        self,
        shard: IndexShard,
        calibration: HiddenStates | None,
        special_token_ids: Sequence[int],
    ) -> Choice:
        """Choose alpha, then the tokens to pin beside those of the options and the special ones.

        Without calibration states alpha is 0, or what the options say, and no further token is
        pinned.
        """
        options = self.options
        given = dict.fromkeys((*options.pinned_token_ids, *special_token_ids))
        if calibration is None:
            return Choice(options.alpha or 0.0, tuple(given))
        alphas = ALPHAS if options.alpha is None else (options.alpha,)
        tokens, ranks = self._ranks(shard, calibration, alphas, "calibrating")
        found = {
            alpha: found_within(row, self.probes_per_group, calibration)
            for alpha, row in zip(alphas, ranks, strict=True)
        }
        alpha = choose_alpha(found)
        room = max(0, options.max_learned_pins(len(self.weights)) - len(special_token_ids))
        ranked = ranks[alphas.index(alpha)]
        learned = missed_tokens(ranked, tokens, self.probes_per_group, room)
        evidence = {
            "num_states": len(calibration),
            "origin": calibration.origin,
            "special_token_ids": list(special_token_ids),
            "learned_pinned_token_ids": learned,
            "top1_agreement_by_alpha": [
                {"alpha": alpha, **result.summary()} for alpha, result in found.items()
            ],
        }
        return Choice(alpha, tuple(sorted({*given, *learned})), evidence)

    def fidelity(
        self, shard: IndexShard, alpha: float, test: HiddenStates | None
    ) -> dict[str, Any]:
        """Fidelity on the test states, for the manifest; empty without any."""
        if test is None or not len(test):
            return {}
        _, ranks = self._ranks(shard, test, (alpha,), "testing")
        found = found_within(ranks[0], self.probes_per_group, test)
        return {
            "num_states": len(test),
            "origin": test.origin,
            **found.summary(),
            "top1_agreement_by_source": found.by_source,
        }

    def _ranks(
        self, shard: IndexShard, states: HiddenStates, alphas: Sequence[float], stage: str
    ) -> tuple[Tensor, Tensor]:
        """Dense argmax `[N]` of the states and its `probe_ranks [alphas, N]`."""
        with (
            compute_threads(self.threads),
            progress(
                f"{stage}: dense head", total=len(states), unit="states", visible=self.visible
            ) as advance,
        ):
            tokens = dense_argmax(self.weights, states.states, advance)
        with progress(
            f"{stage}: index", total=len(shard.token_ids), unit="groups", visible=self.visible
        ) as advance:
            ranks = probe_ranks(shard, states.states, tokens, alphas, advance)
        return tokens, ranks


def dense_argmax(
    weights: Tensor, states: Tensor, advance: Advance = lambda num_states: None
) -> Tensor:
    """Token int64 `[N]` with the greatest float32 logit; of equal logits the smallest id.

    weights: `[V, D]`, any floating dtype.
    """
    hidden = states.to(weights.device)
    if weights.device.type == "cpu" and matmul_is_faster(hidden[:_MATMUL_STATES], weights):
        tokens = []
        for batch in torch.split(hidden, _MATMUL_STATES):
            tokens.append(unpack_keys(dense_candidates(batch, weights, 0).keys)[1][:, 0])
            advance(len(batch))
        return torch.cat(tokens)
    hidden = hidden.float()
    best = torch.full((len(hidden),), float("-inf"), dtype=torch.float32, device=weights.device)
    token = torch.zeros(len(hidden), dtype=torch.int64, device=weights.device)
    for start in range(0, len(weights), _CHUNK_TOKENS):
        rows = weights[start : start + _CHUNK_TOKENS].float().T
        for first in range(0, len(hidden), _CHUNK_STATES):
            part = slice(first, first + _CHUNK_STATES)
            logit, row = (hidden[part] @ rows).max(1)
            better = logit > best[part]
            best[part] = torch.where(better, logit, best[part])
            token[part] = torch.where(better, row + start, token[part])
        advance(len(hidden) * rows.shape[1] / len(weights))
    return token


def probe_ranks(
    shard: IndexShard,
    states: Tensor,
    tokens: Tensor,
    alphas: Sequence[float],
    advance: Advance = lambda num_groups: None,
) -> Tensor:
    """How many clusters of its group precede that of each of `tokens [N]`: int64 `[alphas, N]`.

    A token is a candidate with p probes per group if and only if its number is below p; a pinned
    token has -1. Ties go to the lower slot, as in `select_probes`.
    """
    num_groups, clusters, _ = shard.token_ids.shape
    device = shard.token_ids.device
    home = _home_clusters(shard.token_ids, int(tokens.max()) if len(tokens) else 0)[
        tokens.to(device)
    ]
    group_of = torch.where(home < 0, -1, home // clusters)
    slots = torch.arange(clusters, device=device)
    ranks = torch.full((len(alphas), len(states)), -1, dtype=torch.int64, device=device)
    for group in range(num_groups):
        members = torch.nonzero(group_of == group).flatten()
        centroids, spread = _one_group(shard.centroids, group), shard.spread[group]
        for part in torch.split(members, _CHUNK_STATES):
            hidden = states[part.to(states.device)].to(device).float()
            dots = centroid_dots(hidden, centroids).squeeze(1)
            norms = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True)
            own = (home[part] % clusters).unsqueeze(1)
            for index, alpha in enumerate(alphas):
                scores = dots + torch.where(torch.isneginf(spread), spread, alpha * norms * spread)
                mine = scores.gather(1, own)
                before = (scores > mine) | ((scores == mine) & (slots < own))
                ranks[index, part] = before.sum(1)
        advance(1)
    return ranks


def found_within(ranks: Tensor, probes_per_group: int, states: HiddenStates) -> Found:
    """Fidelity on `states` of N from `ranks [N]` of their dense argmax."""
    found = (ranks < probes_per_group).cpu()
    by_source = {}
    for index, source in enumerate(states.sources):
        of_source = found[states.source_ids == index]
        if len(of_source):
            by_source[source] = float(of_source.double().mean())
    return Found(float(found.double().mean()), by_source)


def choose_alpha(candidates: dict[float, Found]) -> float:
    """The alpha with the best worst source, then the best overall, then the smallest."""
    return max(candidates, key=lambda a: (candidates[a].worst, candidates[a].overall, -a))


def missed_tokens(ranks: Tensor, tokens: Tensor, probes_per_group: int, limit: int) -> list[int]:
    """Up to `limit` token ids that states miss most often, ascending.

    ranks, tokens: `[N]` of N calibration states, as in `probe_ranks`. Counted are states that half
    of `probes_per_group` would miss, then those that a quarter would: other texts miss more than
    the ones that shaped the index.
    """
    chosen: dict[int, None] = {}
    for share in (2, 4):
        missed = tokens[(ranks >= -(-probes_per_group // share)).to(tokens.device)]
        ids, counts = torch.unique(missed, return_counts=True)
        often = ids[torch.argsort(counts, descending=True, stable=True)].tolist()
        chosen |= dict.fromkeys(often)
    return sorted(list(chosen)[:limit])


def calibrate_shrinkage(
    shard: IndexShard, states: HiddenStates, query: Query, *, visible: bool = False
) -> dict[str, Any]:
    """Choose how far the estimated mass of an unprobed cluster shrinks; evidence for the manifest.

    Sampling estimates the mass of every unprobed cluster. The shrinkage of that estimate is the one
    whose distribution costs least in the likelihood of what the dense head would draw: least mean
    Kullback-Leibler divergence at temperature 1, over calibration states drawn evenly from all
    sources. Ties go to the smaller one.
    """
    chosen = spread_over_sources(states, _SHRINKAGE_STATES)
    sums = torch.zeros(2, len(SHRINKAGES), dtype=torch.float64)
    with progress(
        "calibrating: unprobed clusters", total=len(chosen), unit="states", visible=visible
    ) as advance:
        for rows in torch.split(chosen, _BATCH):
            hidden = states.states[rows].to(shard.rows.device)
            sums += _divergences(shard, hidden, query).cpu()
            advance(len(rows))
    divergences, variations = (sums / len(chosen)).tolist()
    evidence = [
        {
            "shrinkage": shrinkage,
            "divergence_nats": round(divergence, 4),
            "total_variation": round(variation, 4),
        }
        for shrinkage, divergence, variation in zip(
            SHRINKAGES, divergences, variations, strict=True
        )
    ]
    best = min(evidence, key=lambda item: (item["divergence_nats"], item["shrinkage"]))
    return {"shrinkage": best["shrinkage"], "divergence_by_shrinkage": evidence}


def calibrate_escalation(
    shard: IndexShard, states: HiddenStates, query: Query, *, visible: bool = False
) -> dict[str, Any]:
    """Evidence for the manifest: the margin below which each of SHARES of the states lies.

    The threshold of a second round is chosen by how many rows may take it, as a quantile of the
    margins of states drawn evenly from all sources. That needs no state whose token was missed:
    such states are few among calibration states, since their tokens were pinned.
    """
    chosen = spread_over_sources(states, _MARGIN_STATES)
    with progress(
        "calibrating: margins", total=len(chosen), unit="states", visible=visible
    ) as advance:
        found = margins(shard, states.states[chosen], query, advance)
    finite = found[torch.isfinite(found)].double()
    by_share = []
    if len(finite):
        quantiles = torch.quantile(finite, torch.tensor(SHARES, dtype=torch.float64)).tolist()
        by_share = [
            {"share": share, "margin": round(margin, 4)}
            for share, margin in zip(SHARES, quantiles, strict=True)
        ]
    return {
        "num_states": len(found),
        "num_probes": query.num_probes_per_group * len(shard.token_ids),
        "margin_by_share": by_share,
    }


def margins(
    shard: IndexShard,
    hidden_states: Tensor,
    query: Query,
    advance: Advance = lambda num_states: None,
) -> Tensor:
    """Margins float32 `[N]` of `hidden_states [N, D]`, in logits; inf where nothing is unprobed.

    A row's margin is the logit of its best candidate less the greatest probing score of a cluster
    that was not probed (`heads.flashhead_escalate`).
    """
    device = shard.rows.device
    query = replace(query, need_unprobed=True)
    ops, found = ops_for(device), []
    for part in torch.split(hidden_states, _BATCH):
        candidates = ops.candidates(part.to(device), shard, query)
        both = torch.stack([candidates.keys[:, 0], candidates.unprobed], dim=1)
        logits = ops.unpack_keys(both)[0]
        found.append((logits[:, 0] - logits[:, 1]).cpu())
        advance(len(part))
    return torch.cat(found) if found else torch.empty(0)


def write_escalation(
    path: Path, *, margin: float, second_probes: int | None, share: float
) -> IndexManifest:
    """Make a threshold the one that flashhead_escalate takes from the index in folder `path`.

    second_probes: clusters of the second round, None for every token. share: of rows that are
    expected to take it. Returns the changed manifest.

    Raises:
        HeadIndexError: no index there, or a manifest that cannot be written.
    """
    manifest = load_manifest(path)
    chosen = {"margin": margin, "second_probes": second_probes, "share": share}
    escalation = {**manifest.calibration.get("escalation", {}), "chosen": chosen}
    return change_manifest(path, calibration={**manifest.calibration, "escalation": escalation})


def spread_over_sources(states: HiddenStates, count: int) -> Tensor:
    """Up to `count` rows, int64: the same number from each source, evenly over its rows."""
    each = max(1, count // max(1, len(states.counts())))
    chosen = []
    for number in range(len(states.sources)):
        rows = (states.source_ids == number).nonzero()[:, 0]
        take = min(each, len(rows))
        if take:
            # Middles of equal parts: the first positions of a text are like no others.
            chosen.append(rows[(2 * torch.arange(take) + 1) * len(rows) // (2 * take)])
    return torch.cat(chosen)[:count]


def _divergences(shard: IndexShard, hidden: Tensor, query: Query) -> Tensor:
    """`[2, n]`: divergence from the dense distribution and total variation to it, summed over
    `hidden [b, D]`, for each of SHRINKAGES.
    """
    ops = sampling_ops_for(hidden.device)
    scores = ops.local_scores(hidden, shard, query)
    of_groups = ops.group_log_mass(scores.logits.view(len(hidden), len(shard.rows), -1))
    scored = of_groups.double().logsumexp(1)
    unprobed = (scores.means > float("-inf")).flatten(1)
    exact = _exact_log_mass(shard, hidden).flatten(1).masked_fill(~unprobed, float("-inf"))
    normalizer = torch.logaddexp(scored, exact.logsumexp(1))
    share = (exact - normalizer.unsqueeze(1)).float().exp()
    scored_share = (scored - normalizer).exp()
    found = []
    for shrinkage in SHRINKAGES:
        mass = ops.cluster_log_mass(
            hidden, shard, scores.means, of_groups, shrinkage, PLAIN
        ).flatten(1)
        estimate = torch.logaddexp(scored, mass.double().logsumexp(1))
        # Within a cluster, and among the scored tokens, both distributions have the same shape.
        lost = torch.where(share > 0, share * (exact.float() - mass), 0).sum(1).double()
        off = (share - (mass - estimate.unsqueeze(1).float()).exp()).abs().sum(1).double()
        off = off + (scored_share - (scored - estimate).exp()).abs()
        found.append(torch.stack([(lost + estimate - normalizer).sum(), off.sum() / 2]))
    return torch.stack(found, dim=1)


def _exact_log_mass(shard: IndexShard, hidden: Tensor) -> Tensor:
    """Log-sum-exp float64 `[b, G, M]` of every cluster's logits; -inf for one of pads."""
    masses = []
    for rows, ids in zip(shard.rows, shard.token_ids, strict=True):
        logits = (hidden.float() @ rows.flatten(0, 1).float().T).view(len(hidden), *ids.shape)
        masses.append(logits.masked_fill(ids < 0, float("-inf")).logsumexp(2).double())
    return torch.stack(masses, dim=1)


def _home_clusters(token_ids: Tensor, highest: int) -> Tensor:
    """Cluster `g * M + m` of each token up to the highest that occurs, -1 for none (pinned)."""
    flat = token_ids.flatten().long()
    size = max(highest, int(flat.max())) + 1
    home = torch.full((size,), -1, dtype=torch.int64, device=token_ids.device)
    real = flat >= 0
    cluster = torch.arange(len(flat), device=token_ids.device) // token_ids.shape[-1]
    home[flat[real]] = cluster[real]
    return home


def _one_group(centroids: QuantizedCentroids, group: int) -> QuantizedCentroids:
    """Centroids with leading shape `[1, M]`."""
    one = slice(group, group + 1)
    scales = None if centroids.scales is None else centroids.scales[one]
    return replace(centroids, values=centroids.values[one], scales=scales)
