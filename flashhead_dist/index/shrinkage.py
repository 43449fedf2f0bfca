"""How far the estimated mass of an unprobed cluster shrinks: calibrated on hidden states.

Sampling estimates the mass of every cluster that it does not open (`flashhead_kernels.sampling`).
The shrinkage of that estimate is the one whose distribution costs least in the likelihood of what
the dense head would draw: least mean Kullback-Leibler divergence at temperature 1, over calibration
states drawn evenly from all sources.

G groups of M clusters of S tokens; N states, b of them at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashhead_dist.index.calibrate import Advance
from flashhead_dist.states import HiddenStates
from flashhead_kernels.dispatch import sampling_ops_for
from flashhead_kernels.noise import PLAIN
from flashhead_kernels.shard import IndexShard, Query

SHRINKAGES = (0.0, 0.3, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.8)
_NUM_STATES = 192
_BATCH = 64


def calibrate_shrinkage(
    tensors: IndexShard,
    states: HiddenStates,
    alpha: float,
    probes_per_group: int,
    advance: Advance = lambda share: None,
) -> dict[str, Any]:
    """Evidence for the manifest, with the `shrinkage` chosen; ties go to the smaller one."""
    chosen = spread_over_sources(states, _NUM_STATES)
    sums = torch.zeros(2, len(SHRINKAGES), dtype=torch.float64)
    for rows in torch.split(chosen, _BATCH):
        hidden = states.states[rows].to(tensors.rows.device)
        sums += _divergences(tensors, hidden, alpha, probes_per_group).cpu()
        advance(len(rows) / len(chosen))
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


def _divergences(
    tensors: IndexShard, hidden: Tensor, alpha: float, probes_per_group: int
) -> Tensor:
    """`[2, n]`: divergence from the dense distribution and total variation to it, summed over
    `hidden [b, D]`, for each of SHRINKAGES.
    """
    ops = sampling_ops_for(hidden.device)
    scores = ops.local_scores(hidden, tensors, Query(probes_per_group, alpha))
    of_groups = ops.group_log_mass(scores.logits.view(len(hidden), len(tensors.rows), -1))
    scored = of_groups.double().logsumexp(1)
    shut = (scores.means > float("-inf")).flatten(1)
    exact = _exact_log_mass(tensors, hidden).flatten(1).masked_fill(~shut, float("-inf"))
    normalizer = torch.logaddexp(scored, exact.logsumexp(1))
    share = (exact - normalizer.unsqueeze(1)).float().exp()
    scored_share = (scored - normalizer).exp()
    found = []
    for shrinkage in SHRINKAGES:
        mass = ops.cluster_log_mass(
            hidden, tensors, scores.means, of_groups, shrinkage, PLAIN
        ).flatten(1)
        estimate = torch.logaddexp(scored, mass.double().logsumexp(1))
        # Within a cluster, and among the scored tokens, both distributions have the same shape.
        lost = torch.where(share > 0, share * (exact.float() - mass), 0).sum(1).double()
        off = (share - (mass - estimate.unsqueeze(1).float()).exp()).abs().sum(1).double()
        off = off + (scored_share - (scored - estimate).exp()).abs()
        found.append(torch.stack([(lost + estimate - normalizer).sum(), off.sum() / 2]))
    return torch.stack(found, dim=1)


def _exact_log_mass(tensors: IndexShard, hidden: Tensor) -> Tensor:
    """Log-sum-exp float64 `[b, G, M]` of every cluster's logits; -inf for one of pads."""
    masses = []
    for rows, ids in zip(tensors.rows, tensors.token_ids, strict=True):
        logits = (hidden.float() @ rows.flatten(0, 1).float().T).view(len(hidden), *ids.shape)
        masses.append(logits.masked_fill(ids < 0, float("-inf")).logsumexp(2).double())
    return torch.stack(masses, dim=1)


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
