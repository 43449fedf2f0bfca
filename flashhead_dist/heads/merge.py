"""The one exchange of a head whose ranks each know their best tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from flashhead_dist.collectives import Exchange, Operation, Steps
from flashhead_dist.heads.base import HeadOutput
from flashhead_kernels.dispatch import ops_for
from flashhead_profiles.ranges import RESULT, annotate


def merge_candidates(
    keys: Tensor,
    logsumexp: Tensor | None = None,
    candidate_logsumexp: Tensor | None = None,
) -> Steps[HeadOutput]:
    """Merge each rank's best `keys [B, k]` and partial log-sum-exps `[B]` in ONE exchange.

    Greedy decoding (k = 1, no log-sum-exp) reduces 8 bytes a row by MAX. Otherwise the ranks gather
    `8 k + 4` bytes a row (4 less or more for no or two log-sum-exps) and merge them locally.

    Ids and logits are those of the greatest keys, whoever holds them, so they do not depend on P.
    The log-sum-exp adds the ranks' float32 partials in float64: it depends on P by the rounding of
    those partials, a few units in the last place.
    """
    partials = [item for item in (logsumexp, candidate_logsumexp) if item is not None]
    k = keys.shape[1]
    if k == 1 and not partials:
        keys = yield Exchange(Operation.MAX, keys)
        return local_output(keys)
    words = [keys.contiguous().view(torch.int32)]
    words += [item.float().contiguous().view(torch.int32).unsqueeze(1) for item in partials]
    gathered = yield Exchange(Operation.GATHER, torch.cat(words, dim=1))
    # A copy: of one row on one rank any slice counts as contiguous, with an odd stride.
    halves = gathered[..., : 2 * k].clone(memory_format=torch.contiguous_format)
    all_keys = halves.view(torch.int64)  # [P, B, k]
    merged = all_keys.transpose(0, 1).flatten(1).topk(k, dim=1).values
    floats = gathered[..., 2 * k :].contiguous().view(torch.float32).double()  # [P, B, n]
    sums = [floats[..., i].logsumexp(0).float() for i in range(len(partials))]
    remaining = iter(sums)
    return local_output(
        merged,
        None if logsumexp is None else next(remaining),
        None if candidate_logsumexp is None else next(remaining),
    )


def local_output(
    keys: Tensor,
    logsumexp: Tensor | None = None,
    candidate_logsumexp: Tensor | None = None,
) -> HeadOutput:
    """The result of a rank that has seen all there is: descending `keys [B, k]`, unpacked."""
    with annotate(RESULT):
        logits, token_ids = ops_for(keys.device).unpack_keys(keys)
    return HeadOutput(token_ids, logits, logsumexp, candidate_logsumexp)
