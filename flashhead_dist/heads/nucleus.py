"""Top-p: a draw from the fewest best tokens whose probabilities reach a given sum.

The ranks gather their best tokens, and sum what all their tokens and unprobed clusters weigh. The
sum is of integers, so it has no order: every tp_size cuts the nucleus at the same token. Where the
nucleus needs more tokens than were gathered, more are, up to all that were scored. Where even these
do not reach the sum, it goes on past them: unprobed clusters enter whole, the one with the greatest
mean probability of a token first, until it is reached.

Letters as in `heads.closed_form`; `P` tp_size.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from flashhead_dist.heads.closed_form import ClosedForm
from flashhead_dist.parallel import Exchange, Operation, Steps
from flashhead_kernels.dispatch import sampling_ops_for
from flashhead_kernels.keys import EMPTY_KEY, pack_keys, unpack_keys
from flashhead_kernels.noise import GumbelNoise

_FIRST_GATHER = 64
_WIDER = 8
_UNIT = 2.0**38
"""Weights are integers in units of the best token's probability over this."""
_MOST = 2.0**44
"""A cluster's estimate may be far above the best token; 2^18 such clusters still fit in int64."""


def draw_from_nucleus(form: ClosedForm, noise: GumbelNoise, top_p: float) -> Steps[Tensor]:
    """A token int64 `[B]` of each row, the same on every rank."""
    keys = pack_keys(form.logits, form.token_ids.expand(form.logits.shape))
    logits, tokens = yield from _best(keys, _FIRST_GATHER)
    best = logits[:, :1]
    scored = torch.full((1,), keys.shape[1], device=keys.device)
    summed = yield Exchange(Operation.SUM, torch.cat([_weigh(form, best), scored]))
    target, count = summed[:-1].double() * top_p, _FIRST_GATHER
    while True:
        weights = _weights(logits, best).cumsum(1).double()
        covered = weights[:, -1] >= target
        enough = bool(covered.all())
        if enough:
            break
        scored_in_all = int(summed[-1])
        if count >= scored_in_all:
            break
        count = min(count * _WIDER, scored_in_all)
        logits, tokens = yield from _best(keys, count)
    before = functional.pad(weights[:, :-1], (1, 0))
    kept = (before < target.unsqueeze(1)) & (tokens >= 0)
    noisy = logits + sampling_ops_for(logits.device).gumbel(noise, tokens)
    place = noisy.masked_fill(~kept, float("-inf")).argmax(1, keepdim=True)
    chosen: Tensor = tokens.gather(1, place)[:, 0]
    if enough:
        return chosen
    drawn = yield from _draw_past_candidates(form, noise, target - weights[:, -1], best)
    return torch.where(covered, chosen, drawn)


def _best(keys: Tensor, count: int) -> Steps[tuple[Tensor, Tensor]]:
    """Final logits and ids `[B, count]` of the best tokens of all ranks' `keys [B, R]`."""
    own = keys.topk(min(count, keys.shape[1]), dim=1).values
    if own.shape[1] < count:
        own = functional.pad(own, (0, count - own.shape[1]), value=EMPTY_KEY)
    gathered = yield Exchange(Operation.GATHER, own)
    return unpack_keys(gathered.transpose(0, 1).flatten(1).topk(count, dim=1).values)


def within_mass(final: Tensor, top_p: float) -> Tensor:
    """Which of descending final logits `[B, k]` make up `top_p` of what all k weigh: bool `[B, k]`.

    The first always; -inf never, unless it comes first.
    """
    weights = _weights(final, final[:, :1])
    before = functional.pad(weights.cumsum(1)[:, :-1], (1, 0))
    return before.double() < (weights.sum(1, keepdim=True).double() * top_p)


def _draw_past_candidates(
    form: ClosedForm, noise: GumbelNoise, missing: Tensor, best: Tensor
) -> Steps[Tensor]:
    """A draw from all scored tokens and the best unprobed clusters that weigh `missing [B]`."""
    assert form.index is not None
    manifest = form.index.manifest
    level = form.log_mass - form.index.shard.num_tokens.clamp(min=1).float().log()
    width = -(-manifest.num_groups // _num_ranks(form))
    own = torch.stack([level, form.log_mass])
    own = functional.pad(own, (0, 0, 0, width - own.shape[2]), value=float("-inf")).transpose(0, 1)
    gathered = yield Exchange(Operation.GATHER, own.contiguous())  # [P, B, 2, width, M]
    # Rank r holds groups r, r + P, ...: in order of the group, whatever P is.
    everyone = gathered.permute(1, 2, 3, 0, 4).flatten(2, 3)[:, :, : manifest.num_groups]
    levels, masses = everyone.flatten(2).unbind(1)
    order = levels.argsort(dim=1, descending=True, stable=True)
    weights = _weights(masses.gather(1, order), best)
    before = functional.pad(weights.cumsum(1)[:, :-1], (1, 0)).double()
    kept = torch.zeros_like(levels, dtype=torch.bool)
    kept.scatter_(1, order, before < missing.unsqueeze(1))
    mine = kept.view(len(kept), manifest.num_groups, -1)[:, form.index.shard.group_ids]
    ops = sampling_ops_for(mine.device)
    mass = form.log_mass.masked_fill(~mine, float("-inf"))
    restricted = replace(form, log_mass=mass, group_log_mass=ops.group_log_mass(mass))
    keys = yield Exchange(Operation.MAX, restricted.draw(noise).unsqueeze(1))
    return unpack_keys(keys[:, 0])[1]


def _num_ranks(form: ClosedForm) -> int:
    assert form.index is not None
    return form.index.tp_size


def _weigh(form: ClosedForm, best: Tensor) -> Tensor:
    """What this rank's tokens and clusters weigh, int64 `[B]`."""
    clusters = _weights(form.log_mass.flatten(1), best).sum(1)
    return _weights(form.logits, best).sum(1) + clusters


def _weights(logs: Tensor, best: Tensor) -> Tensor:
    """exp(logs - best) in whole units, int64 like `logs [B, n]`; best: `[B, 1]`."""
    return ((logs.double() - best.double()).exp() * _UNIT).clamp(max=_MOST).round().long()
