"""The one exchange of a head whose ranks each know their best tokens."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from flashhead_dist.heads.base import HeadOutput, Want
from flashhead_dist.parallel import Exchange, Operation, Steps
from flashhead_kernels.dispatch import ops_for
from flashhead_kernels.shard import Candidates
from flashhead_profiles.ranges import RESULT, annotate


def merge_candidates(
    found: Candidates, candidate_logsumexp: Tensor | None = None
) -> Steps[HeadOutput]:
    """Merge each rank's best keys `[B, k]` and partial log-sum-exps `[B]` in ONE exchange.

    Greedy decoding (k = 1, no log-sum-exp) reduces 8 bytes a row by MAX. Otherwise the ranks gather
    `8 k + 4` bytes a row (4 less or more for no or two log-sum-exps) and merge them locally.

    Ids and logits are those of the greatest keys, whoever holds them, so they do not depend on P.
    The log-sum-exp adds the ranks' float32 partials in float64: it depends on P by the rounding of
    those partials, a few units in the last place.
    """
    partials = [item for item in (found.logsumexp, candidate_logsumexp) if item is not None]
    k = found.keys.shape[1]
    if k == 1 and not partials:
        if found.token_ids is None or found.logits is None:
            keys = yield Exchange(Operation.MAX, found.keys)
            return local_output(Candidates(keys, None))
        yield Exchange(Operation.MAX, found.keys, (found.token_ids, found.logits))
        return HeadOutput(found.token_ids, found.logits)
    all_keys, sums = yield from _gather(found.keys, partials)
    merged = all_keys.topk(k, dim=1).values
    return _output(merged, sums, found.logsumexp is not None)


def merge_scanned(found: Candidates, want: Want) -> Steps[HeadOutput]:
    """`merge_candidates` where every token is one, so that one log-sum-exp serves for both."""
    mass = found.logsumexp if want.candidate_mass else None
    logsumexp = found.logsumexp if want.logsumexp else None
    return (yield from merge_candidates(replace(found, logsumexp=logsumexp), mass))


def merge_judged(
    keys: Tensor,
    unprobed: Tensor,
    logsumexp: Tensor | None = None,
    candidate_logsumexp: Tensor | None = None,
) -> Steps[tuple[HeadOutput, Tensor]]:
    """As `merge_candidates`, with the greatest of the ranks' `unprobed` keys int64 `[B]` as well.

    It travels in the same exchange, 8 bytes a row more. The second result is its score, float32
    `[B]`, the same on every rank and at every P: -inf where every cluster was probed.
    """
    partials = [item for item in (logsumexp, candidate_logsumexp) if item is not None]
    k = keys.shape[1]
    both = torch.cat([keys, unprobed.unsqueeze(1)], dim=1)
    if k == 1 and not partials:
        both = yield Exchange(Operation.MAX, both)
        # Unpacked together: on a GPU that is plain torch, at one price for one number or for two.
        output = local_output(Candidates(both, None))
        return HeadOutput(output.token_ids[:, :1], output.logits[:, :1]), output.logits[:, 1]
    gathered, sums = yield from _gather(both, partials)
    by_rank = gathered.view(len(keys), -1, k + 1)
    merged = by_rank[..., :k].flatten(1).topk(k, dim=1).values
    left, _ = ops_for(keys.device).unpack_keys(by_rank[..., k:].amax(1))
    return _output(merged, sums, logsumexp is not None), left[:, 0]


def _gather(keys: Tensor, partials: list[Tensor]) -> Steps[tuple[Tensor, list[Tensor]]]:
    """All ranks' `keys [B, n]` as `[B, P * n]`, and the sums `[B]` of their log-sum-exps."""
    n = keys.shape[1]
    words = [keys.contiguous().view(torch.int32)]
    words += [item.float().contiguous().view(torch.int32).unsqueeze(1) for item in partials]
    gathered = yield Exchange(Operation.GATHER, torch.cat(words, dim=1))
    # A copy: of one row on one rank any slice counts as contiguous, with an odd stride.
    halves = gathered[..., : 2 * n].clone(memory_format=torch.contiguous_format)
    all_keys = halves.view(torch.int64)  # [P, B, n]
    floats = gathered[..., 2 * n :].contiguous().view(torch.float32).double()  # [P, B, sums]
    sums = [floats[..., i].logsumexp(0).float() for i in range(len(partials))]
    return all_keys.transpose(0, 1).reshape(len(keys), -1), sums


def _output(keys: Tensor, sums: list[Tensor], has_logsumexp: bool) -> HeadOutput:
    """`sums`: log-sum-exp, then that over the candidates; either may be missing."""
    remaining = iter(sums)
    logsumexp = next(remaining) if has_logsumexp else None
    return local_output(Candidates(keys, logsumexp), next(remaining, None))


def local_output(found: Candidates, candidate_logsumexp: Tensor | None = None) -> HeadOutput:
    """The result of a rank that has seen all there is: descending keys `[B, k]`, unpacked."""
    logits, token_ids = found.logits, found.token_ids
    if logits is None or token_ids is None:
        with annotate(RESULT):
            logits, token_ids = ops_for(found.keys.device).unpack_keys(found.keys)
    return HeadOutput(token_ids, logits, found.logsumexp, candidate_logsumexp)
