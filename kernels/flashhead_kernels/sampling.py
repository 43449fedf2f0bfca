"""What sampling needs of a rank, in plain torch: the definition for `cpu_sampling`.

A rank knows the exact logits of its candidates and, of every cluster that was not probed, the mean
m of its n tokens' logits and a spread. Log-sum-exp is above log n + m / T (Jensen), the more so the
less the mean says of the best token, and estimates of it shrink toward what is known, the mass r of
the group's candidates:

    m_c = e + w * max(0, r - BELOW - e)        e = log n + m / T
    w   = shrinkage * x / (x + HALF_WAY)       x = |h| * spread / T

Why not the next cumulant, x^2 / 2: the spreads of a cluster's logits have heavy tails, and a few
clusters of great spread would take all the mass of a hidden state of great norm
(docs/concepts/distribution.md). With soft-capping, m is capped and the spread shrinks by the slope
there.

Letters: `B` rows, `N` groups of `M` clusters of `S` tokens, `R` candidates, `n` draws.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flashhead_kernels import reference
from flashhead_kernels.keys import pack_keys
from flashhead_kernels.noise import Domain, FinalLogits, GumbelNoise, gumbel
from flashhead_kernels.shard import IndexShard, Query

BELOW = 2.0
HALF_WAY = 4.0
_GROUPS_AT_ONCE = 8
"""Probing groups whose rows are held in float32 while every token is scored."""


@dataclass(frozen=True)
class LocalScores:
    """What one rank knows of hidden states, before soft-capping and temperature.

    logits: float32 `[B, R]` of its candidates, -inf for a pad; token_ids: int32 `[B, R]`, or
    `[1, R]` where all rows have the same, -1 for a pad. means: float32 `[B, N, M]`, `h . mean` of
    every cluster, -inf where it was probed (or holds pads only).
    """

    logits: Tensor
    token_ids: Tensor
    means: Tensor


@dataclass(frozen=True)
class Weighed:
    """What one rank draws from.

    logits: final logits float32 `[B, R]`, token_ids: int32, both as in LocalScores; log_mass:
    float32 `[B, N, M]` of clusters, -inf where scored; group_log_mass: float32 `[B, N]`.
    """

    logits: Tensor
    token_ids: Tensor
    log_mass: Tensor
    group_log_mass: Tensor


def local_scores(hidden_states: Tensor, shard: IndexShard, query: Query) -> LocalScores:
    """What one rank knows of `hidden_states [B, D]`, probed as `reference.candidates` does.

    Candidates are a group's probes in ascending order, then its pinned tokens, group after group.
    """
    batch, (groups, clusters, tokens) = hidden_states.shape[0], shard.token_ids.shape
    means = reference.centroid_dots(hidden_states, shard.centroids)
    scores = reference.score_centroids(hidden_states, shard, query.alpha)
    probes = reference.select_probes(scores, query.num_probes_per_group).long()
    first = torch.arange(groups, device=probes.device)[None, :, None] * clusters
    chosen = (probes + first).flatten(1)
    logits = reference.score_rows(hidden_states, shard.cluster_rows, chosen.int())
    shape = (batch, groups, query.num_probes_per_group * tokens)
    ids = shard.cluster_token_ids[chosen].view(shape)
    pinned = torch.einsum("bd,nqd->bnq", hidden_states.float(), shard.pinned_rows.float())
    all_ids = torch.cat([ids, shard.pinned_token_ids.expand(batch, -1, -1)], dim=2).flatten(1)
    all_logits = torch.cat([logits.view(shape), pinned], dim=2).flatten(1)
    means = means.scatter(2, probes, -torch.inf).masked_fill(shard.spread.isneginf(), -torch.inf)
    return LocalScores(all_logits.masked_fill(all_ids < 0, float("-inf")), all_ids, means)


def dense_scores(hidden_states: Tensor, rows: Tensor, first_token_id: int) -> LocalScores:
    """Every one of `rows [R, D]`, tokens `first_token_id ...`, is a candidate; no clusters."""
    ids = torch.arange(len(rows), dtype=torch.int32, device=rows.device) + first_token_id
    no_clusters = hidden_states.new_empty((len(hidden_states), 0, 0), dtype=torch.float32)
    return LocalScores(hidden_states.float() @ rows.float().T, ids.unsqueeze(0), no_clusters)


def every_logit(hidden_states: Tensor, rows: Tensor) -> Tensor:
    """Logits float32 `[B, N * M * S]` of `rows [N, M, S, D]`, each rounded as it may be.

    The fastest way, where nothing need be the same bits at another tp_size or batch size.
    """
    hidden = hidden_states.float()
    parts = torch.split(rows, _GROUPS_AT_ONCE)
    return torch.cat([hidden @ part.flatten(0, 2).float().T for part in parts], dim=1)


def final_logits(logits: Tensor, final: FinalLogits) -> Tensor:
    """`final.without_noise`; on a CPU the same bits wherever a logit stands."""
    return final.without_noise(logits)


def cluster_log_mass(
    hidden_states: Tensor,
    shard: IndexShard,
    means: Tensor,
    scored: Tensor,
    shrinkage: float,
    final: FinalLogits,
) -> Tensor:
    """Estimated log mass m_c float32 `[B, N, M]` of clusters.

    means: as in LocalScores, whose -inf stay -inf; scored: r, the log mass `[B, N]` of each group's
    candidates.
    """
    norms = torch.linalg.vector_norm(hidden_states.float(), dim=-1)[:, None, None]
    slope = torch.ones_like(means)
    if final.softcap:
        slope = 1 - torch.tanh(means / final.softcap) ** 2
    x = norms * shard.spread.clamp(min=0) / final.temperature * slope
    estimate: Tensor = final.without_noise(means) + shard.num_tokens.float().log()
    gap = (scored.unsqueeze(2) - BELOW - estimate).clamp(min=0)
    mass: Tensor = estimate + shrinkage * x / (x + HALF_WAY) * gap
    return mass.masked_fill(torch.isneginf(means) | torch.isneginf(estimate), float("-inf"))


def group_log_mass(log_mass: Tensor) -> Tensor:
    """Log mass float32 `[B, N]` of whole groups of clusters `[B, N, M]`."""
    mass: Tensor = log_mass.logsumexp(2)
    return mass


def draw_candidates(
    final: Tensor, token_ids: Tensor, row_of_draw: Tensor, noise: GumbelNoise
) -> Tensor:
    """Greatest key int64 `[n]` of final logits `[B, R]` with noise.

    token_ids: `[B, R]` or `[1, R]`; row_of_draw: int64 `[n]`; noise: of n rows.
    """
    logits = final[row_of_draw]
    ids = token_ids.expand(len(final), -1)[row_of_draw]
    noisy = (logits + gumbel(noise, ids)).masked_fill(ids < 0, float("-inf"))
    keys: Tensor = reference.best_keys(noisy, ids, 1)
    return keys[:, 0]


def draw_groups(
    hidden_states: Tensor,
    shard: IndexShard,
    weighed: Weighed,
    row_of_draw: Tensor,
    final: FinalLogits,
) -> Tensor:
    """Greatest key int64 `[n]` of draws from candidates and unprobed clusters; `[B, D]` states.

    row_of_draw: int64 `[n]`; final: with the noise of n rows.

    Candidates compete with noise of their own. A group competes by its summed mass and noise; it
    draws one of its clusters, and of the cluster's tokens one, whose key holds the group's value.
    """
    noise = final.noise
    assert noise is not None
    keys = draw_candidates(weighed.logits, weighed.token_ids, row_of_draw, noise)
    draws, (groups, clusters) = len(row_of_draw), shard.spread.shape
    values = weighed.group_log_mass[row_of_draw]
    values = values + gumbel(noise, shard.group_ids.expand(draws, -1), Domain.GROUP)
    slots = torch.arange(clusters, device=values.device)
    numbers = shard.group_ids.unsqueeze(1) * clusters + slots
    of_clusters = gumbel(noise, numbers.flatten().expand(draws, -1), Domain.CLUSTER)
    within = weighed.log_mass[row_of_draw] + of_clusters.view(draws, groups, clusters)
    chosen = within.argmax(2) + torch.arange(groups, device=values.device) * clusters
    logits = reference.score_rows(hidden_states[row_of_draw], shard.cluster_rows, chosen)
    ids = shard.cluster_token_ids[chosen]
    # The tokens' own noise: unused so far, and the noise that a dense head's draw has.
    of_tokens = gumbel(noise, ids.flatten(1), Domain.TOKEN).view(ids.shape)
    noisy = (final.without_noise(logits) + of_tokens).masked_fill(ids < 0, float("-inf"))
    drawn = ids.gather(2, noisy.argmax(2, keepdim=True))[..., 0]
    opened = pack_keys(values, drawn.masked_fill(torch.isneginf(values), -1))
    return torch.maximum(keys, opened.amax(1))


def draw_dense(
    hidden_states: Tensor,
    rows: Tensor,
    first_token_id: int,
    token_ids: Tensor | None,
    final: FinalLogits,
) -> Tensor:
    """Greatest key int64 `[B]` of all `rows [R, D]`, by final logits with noise.

    The rows hold tokens `first_token_id ...`, or token_ids int32 `[R]` (-1 for a pad).
    """
    keys: Tensor = reference.dense_candidates(
        hidden_states, rows, first_token_id, token_ids=token_ids, final=final
    ).keys
    return keys[:, 0]


def dense_log_mass(
    hidden_states: Tensor,
    rows: Tensor,
    token_ids: Tensor | None,
    own_rows: Tensor,
    final: FinalLogits,
) -> Tensor:
    """float64 `[B, 2]`: final logit of one of `rows [R, D]` each, and log-sum-exp of all.

    own_rows: int64 `[B]`, -1 for none, whose logit is -inf; token_ids: as in `draw_dense`.
    """
    logits = final_logits(dense_scores(hidden_states, rows, 0).logits, final)
    return own_and_all(logits, token_ids, own_rows)


def own_and_all(logits: Tensor, token_ids: Tensor | None, own_rows: Tensor) -> Tensor:
    """What `dense_log_mass` gives, from all final logits `[B, R]`."""
    if token_ids is not None:
        logits = logits.masked_fill(token_ids < 0, float("-inf"))
    own = logits.gather(1, own_rows.clamp(min=0).unsqueeze(1))[:, 0].double()
    own = own.masked_fill(own_rows < 0, float("-inf"))
    return torch.stack([own, logits.double().logsumexp(1)], dim=1)


def some_or_all(chosen: Tensor) -> Tensor:
    """Places int64 of a bool `[n]` to work on: at least those where it is true.

    All of them on CUDA, where the host would wait to learn how many are.
    """
    return chosen.nonzero()[:, 0]
