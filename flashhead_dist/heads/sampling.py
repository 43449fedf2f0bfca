"""Choosing tokens by chance, the same ones on every rank and at every tp_size.

A draw is the greatest of logits with Gumbel noise, and the noise is counter-based (Philox), keyed
by (seed, sequence, position, token id): who scores a token does not matter, and a dense head and a
retrieval head that see the same hidden state draw the same token wherever the winner is among the
tokens that retrieval scored. `heads.distribution` says what is drawn from.

What goes over the wire, a row:
    temperature      one maximum of 8 bytes
    + top-k          one gather of 8 k bytes a rank; exact over the scored tokens
    + top-p          a gather of 8 n bytes a rank, n = 64 or as many as the nucleus needs, and a sum
                     of 8 bytes

Top-p draws from the fewest best tokens whose probabilities reach a given sum. The ranks gather
their best tokens, and sum the weights of all their tokens and unprobed clusters. These are
integers, so their sum has no order: every tp_size cuts the nucleus at the same token. Where the
nucleus needs more tokens than were gathered, more are, up to all that were scored. Where even these
do not reach the sum, unprobed clusters enter as a whole, the one with the greatest mean probability
of a token first, until it is reached.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from flashhead_dist.errors import UserError
from flashhead_dist.heads.base import Head, Want
from flashhead_dist.heads.distribution import (
    ClosedForm,
    ScanningHead,
    draw_scanning,
    form_of,
    require_sampling_head,
    sampled_final,
    scanning_log_mass,
)
from flashhead_dist.heads.flashhead import FlashHead
from flashhead_dist.heads.registry import EmulatedHead
from flashhead_dist.models.contract import PLAIN, OutputContract
from flashhead_dist.parallel import (
    Exchange,
    Operation,
    Steps,
    TensorParallel,
    run_in_lock_step,
)
from flashhead_kernels.dispatch import sampling_ops_for
from flashhead_kernels.keys import EMPTY_KEY, pack_keys, unpack_keys
from flashhead_kernels.noise import GumbelNoise, to_device
from flashhead_profiles.ranges import HEAD, annotate

T = TypeVar("T")
_WORDS = 1 << 32
_SEEDS = 1 << 64
_FIRST_GATHER = 64
_WIDER = 8
_UNIT = 2.0**38
"""Weights are integers in units of the best token's probability over this."""
_MOST = 2.0**44
"""A cluster's estimate may be far above the best token; 2^18 such clusters still fit in int64."""


@dataclass(frozen=True, kw_only=True)
class SamplingParameters:
    """How a token is chosen.

    Top-k acts before top-p, which then cuts among the k; without top-k it cuts the whole
    vocabulary. Both act on the distribution at `temperature`, as in transformers and vLLM.

    Raises:
        UserError: a value outside its range.
    """

    temperature: float = 0.0
    """0: the best token. Otherwise logits are divided by it."""
    top_k: int = 0
    """Only the k best tokens; exactly k, ties going to the smaller id. 0: all."""
    top_p: float = 1.0
    """Only the fewest best tokens whose probabilities reach this sum. 1: all."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(
                f"temperature {self.temperature} must be finite and not below 0: 0 takes the best "
                f"token, 1 is the model's own distribution"
            )
        if self.top_k < 0:
            raise UserError(f"top_k {self.top_k} is below 0: give a number of tokens, or 0 for all")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p {self.top_p} must lie above 0 and not above 1; 1 cuts nothing")
        if not 0 <= self.seed < _SEEDS:
            raise UserError(f"seed {self.seed} must lie between 0 and 2^64 - 1")

    @property
    def is_greedy(self) -> bool:
        """Whether chance has no part."""
        return self.temperature == 0


def choose_tokens(
    head: Head | EmulatedHead,
    hidden_states: Tensor,
    positions: Tensor,
    sequences: Tensor,
    parameters: SamplingParameters,
    *,
    contract: OutputContract = PLAIN,
) -> Tensor:
    """The next token int64 `[B]` of each row, the same on every rank and for every tp_size.

    hidden_states: `[B, D]`. positions: int64 `[B]`, how many tokens stand before the one to be
    drawn in its own text; sequences: int64 `[B]`, the number of that text. The two, each below
    2^32, key the noise: a pair that comes twice draws with the same noise twice. contract: what
    the model makes of products of states and rows.

    Temperature 0 works for every head. Positions and sequences on a GPU are not checked, which the
    host would have to wait for: their low 32 bits count.

    Raises:
        UserError: a head that does not sample, more top-k tokens than the head scores, positions
            or sequences that do not fit, and what `Head.forward` refuses.
    """
    return _run(
        head,
        lambda rank: sampling_steps(
            rank, hidden_states, positions, sequences, parameters, contract=contract
        ),
    )


def token_log_probs(
    head: Head | EmulatedHead,
    hidden_states: Tensor,
    token_ids: Tensor,
    *,
    temperature: float = 1.0,
    contract: OutputContract = PLAIN,
) -> Tensor:
    """log P of `token_ids` int64 `[B]`, one for each row of `hidden_states [B, D]`: float32 `[B]`.

    In closed form (see `heads.distribution`), for any token of the vocabulary, scored or not;
    normalised over the vocabulary. Across tp_size equal within float32 rounding. One gather of 16
    bytes a rank and row.

    Raises:
        UserError: a head that does not sample, ids outside the vocabulary, a temperature not above
            0, and what `Head.forward` refuses.
    """
    vocab_size = head.vocab_size
    if token_ids.shape != hidden_states.shape[:1]:
        raise UserError(
            f"token ids of shape {tuple(token_ids.shape)} do not fit {len(hidden_states)} hidden "
            f"states: give one for each"
        )
    if bool(((token_ids < 0) | (token_ids >= vocab_size)).any()):
        raise UserError(f"token ids must lie between 0 and {vocab_size - 1}: give others")
    return _run(
        head,
        lambda rank: _log_prob_steps(rank, hidden_states, token_ids, temperature, contract),
    )


def sampling_steps(
    head: Head,
    hidden_states: Tensor,
    positions: Tensor,
    sequences: Tensor,
    parameters: SamplingParameters,
    *,
    contract: OutputContract = PLAIN,
) -> Steps[Tensor]:
    """One rank's part of `choose_tokens`, whose arguments these are."""
    head.check(hidden_states, Want(k=max(1, parameters.top_k)))
    if not parameters.is_greedy:
        require_sampling_head(head)
        _check_top_k(head, parameters.top_k)
    if len(hidden_states) == 0:
        return torch.empty(0, dtype=torch.int64, device=hidden_states.device)
    if parameters.is_greedy:
        output = yield from head.steps(hidden_states, Want())
        return output.token_ids[:, 0]
    noise = _noise(parameters.seed, positions, sequences, hidden_states)
    if parameters.top_k:
        return (yield from _top_k_steps(head, hidden_states, noise, parameters, contract))
    final = contract.final_logits(parameters.temperature)
    if parameters.top_p < 1:
        form = form_of(head, hidden_states, final)
        steps = draw_from_nucleus(form, noise, parameters.top_p)
        return (yield from steps) if head.sharded else TensorParallel.single().run(steps)
    if isinstance(head, ScanningHead):
        keys = draw_scanning(head, hidden_states, replace(final, noise=noise))
    else:
        keys = form_of(head, hidden_states, final).draw(noise)
    if head.sharded:
        keys = (yield Exchange(Operation.MAX, keys.unsqueeze(1)))[:, 0]
    return unpack_keys(keys)[1]


def _top_k_steps(
    head: Head,
    hidden_states: Tensor,
    noise: GumbelNoise,
    parameters: SamplingParameters,
    contract: OutputContract,
) -> Steps[Tensor]:
    """Every rank knows the k best and draws among them: no further exchange."""
    best = yield from head.steps(hidden_states, Want(k=parameters.top_k))
    final = contract.final_logits(parameters.temperature)
    ops = sampling_ops_for(hidden_states.device)
    logits = ops.final_logits(best.logits, final)
    if parameters.top_p < 1:
        kept = within_mass(logits, parameters.top_p)
        logits = logits.masked_fill(~kept, float("-inf"))
    noisy = logits + ops.gumbel(noise, best.token_ids)
    chosen: Tensor = best.token_ids.gather(1, noisy.argmax(1, keepdim=True))[:, 0]
    return chosen


def _log_prob_steps(
    head: Head,
    hidden_states: Tensor,
    token_ids: Tensor,
    temperature: float,
    contract: OutputContract,
) -> Steps[Tensor]:
    final = sampled_final(head, hidden_states, temperature, contract)
    if len(token_ids) == 0:
        return torch.empty(0, dtype=torch.float32, device=hidden_states.device)
    token_ids = to_device(token_ids, hidden_states.device)
    if isinstance(head, ScanningHead):
        parts = scanning_log_mass(head, hidden_states, token_ids, final)
    else:
        form = form_of(head, hidden_states, final)
        parts = torch.stack([form.token_log_mass(token_ids), form.log_normalizer()], dim=1)
    if head.sharded:
        gathered = yield Exchange(Operation.GATHER, parts)
        parts = gathered.logsumexp(0)
    return (parts[:, 0] - parts[:, 1]).float()


def _noise(seed: int, positions: Tensor, sequences: Tensor, hidden_states: Tensor) -> GumbelNoise:
    for name, numbers in (("positions", positions), ("sequences", sequences)):
        if numbers.shape != hidden_states.shape[:1]:
            raise UserError(
                f"{name} of shape {tuple(numbers.shape)} do not fit {len(hidden_states)} hidden "
                f"states: give one for each"
            )
        # Of numbers on a GPU, which would have to be waited for, the low 32 bits count.
        if not numbers.is_cuda and bool(((numbers < 0) | (numbers >= _WORDS)).any()):
            raise UserError(f"{name} must lie between 0 and 2^32 - 1: number them anew")
    return GumbelNoise(seed, positions, sequences).to(hidden_states.device)


def _check_top_k(head: Head, top_k: int) -> None:
    if not isinstance(head, FlashHead):
        return
    per_group = -(-head.num_probes // head.num_groups)
    manifest = head.index.manifest
    scored = head.num_groups * (per_group * manifest.cluster_size + manifest.num_pinned)
    if top_k > scored:
        raise UserError(
            f"top_k {top_k} is more than the {scored} tokens that head {head.name} scores: give "
            f"fewer, or more --num-probes"
        )


def _run(head: Head | EmulatedHead, steps_of: Callable[[Head], Steps[T]]) -> T:
    if isinstance(head, EmulatedHead):
        return run_in_lock_step([steps_of(rank) for rank in head.ranks])[0]
    with annotate(HEAD, label=head.name):
        return head.tp.run(steps_of(head))


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
