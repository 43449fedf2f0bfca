"""How much mass an unprobed cluster's spread adds: calibrated on hidden states.

Sampling estimates the mass of every cluster that it does not open (`flashhead_kernels.sampling`).
The curvature of that estimate is the one whose distribution comes closest to the dense one: least
mean total variation at temperature 1, over calibration states drawn evenly from all sources.

G groups of M clusters of S tokens; N states, b of them at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashhead_dist.hidden_states import HiddenStates
from flashhead_dist.index.calibrate import Advance
from flashhead_dist.index.layout import IndexTensors
from flashhead_kernels.logits import PLAIN
from flashhead_kernels.sampling_dispatch import sampling_ops_for

CURVATURES = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 1.0)
_NUM_STATES = 192
_BATCH = 64


def calibrate_curvature(
    tensors: IndexTensors,
    states: HiddenStates,
    alpha: float,
    probes_per_group: int,
    advance: Advance = lambda share: None,
) -> dict[str, Any]:
    """Evidence for the manifest, with the `curvature` chosen; ties go to the smaller one."""
    chosen = _spread_over_sources(states, _NUM_STATES)
    distances = torch.zeros(len(CURVATURES), dtype=torch.float64)
    for rows in torch.split(chosen, _BATCH):
        hidden = states.states[rows].to(tensors.rows.device)
        distances += _distances(tensors, hidden, alpha, probes_per_group).cpu()
        advance(len(rows) / len(chosen))
    means = [round(float(total), 4) for total in distances / len(chosen)]
    best = min(range(len(CURVATURES)), key=lambda i: (means[i], CURVATURES[i]))
    return {
        "curvature": CURVATURES[best],
        "total_variation_by_curvature": [
            {"curvature": curvature, "total_variation": mean}
            for curvature, mean in zip(CURVATURES, means, strict=True)
        ],
    }


def _distances(
    tensors: IndexTensors, hidden: Tensor, alpha: float, probes_per_group: int
) -> Tensor:
    """Total variation to the dense distribution, summed over `hidden [b, D]`, by curvature."""
    ops = sampling_ops_for(hidden.device)
    scores = ops.local_scores(
        hidden, tensors.rows, tensors.token_ids, tensors.centroids, tensors.spread, alpha,
        probes_per_group, tensors.pinned_rows, tensors.pinned_token_ids,
    )  # fmt: skip
    scored = scores.logits.double().logsumexp(1)
    shut = (scores.means > float("-inf")).flatten(1)
    exact = _exact_log_mass(tensors, hidden).flatten(1).masked_fill(~shut, float("-inf"))
    normalizer = torch.logaddexp(scored, exact.logsumexp(1))
    share = (exact - normalizer.unsqueeze(1)).float().exp()
    scored_share = (scored - normalizer).exp()
    num_tokens = (tensors.token_ids >= 0).sum(2)
    found = []
    for curvature in CURVATURES:
        mass = ops.cluster_log_mass(
            hidden, scores.means, num_tokens, tensors.spread, curvature, PLAIN
        ).flatten(1)
        estimate = torch.logaddexp(scored, mass.double().logsumexp(1))
        # Within a cluster, and among the scored tokens, both distributions have the same shape.
        off = (share - (mass - estimate.unsqueeze(1).float()).exp()).abs().sum(1).double()
        off = off + (scored_share - (scored - estimate).exp()).abs()
        found.append(off.sum() / 2)
    return torch.stack(found)


def _exact_log_mass(tensors: IndexTensors, hidden: Tensor) -> Tensor:
    """Log-sum-exp float64 `[b, G, M]` of every cluster's logits; -inf for one of pads."""
    masses = []
    for rows, ids in zip(tensors.rows, tensors.token_ids, strict=True):
        logits = (hidden.float() @ rows.flatten(0, 1).float().T).view(len(hidden), *ids.shape)
        masses.append(logits.masked_fill(ids < 0, float("-inf")).logsumexp(2).double())
    return torch.stack(masses, dim=1)


def _spread_over_sources(states: HiddenStates, count: int) -> Tensor:
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
