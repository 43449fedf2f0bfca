"""Rows of logits over the vocabulary, for a sampler that wants one value for every token.

Each probing group of clusters says what it knows of a row: its candidates' logits, the estimated
log mass of its `_HEAVY` heaviest unprobed clusters, and that of the rest. That is what is exchanged
over tensor-parallel ranks, group by group, so a row is the same at every tp_size.

Letters: `B` rows, `G` groups in all, `N` groups of this rank, `M` clusters of a group, `S` tokens
of a cluster, `Rg` candidates of a group, `H` heavy clusters of a group, `V` vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flashhead_dist.heads.distribution import retrieve
from flashhead_dist.heads.flashhead import FlashHead
from flashhead_dist.integrations.vllm.needs import Rest
from flashhead_dist.parallel import Exchange, Operation, Steps
from flashhead_kernels.noise import FinalLogits

_HEAVY = 32
_BELOW = 2.0**-7
"""How far below the best candidate others are held, relatively: more than bfloat16 rounds away."""


@dataclass(frozen=True)
class VocabularyMap:
    """Where tokens are, over all ranks: token_ids int32 `[G, M, S]` (-1 pad); group_of_token int64
    `[V]`, of a pinned token any."""

    token_ids: Tensor
    group_of_token: Tensor

    @classmethod
    def of(cls, token_ids: Tensor, vocab_size: int) -> VocabularyMap:
        """The map of `token_ids [G, M, S]`."""
        group_of_token = torch.zeros(vocab_size, dtype=torch.int64, device=token_ids.device)
        flat = token_ids.flatten(1)
        groups = torch.arange(len(flat), device=flat.device).unsqueeze(1).expand_as(flat)
        real = flat >= 0
        group_of_token[flat[real].long()] = groups[real]
        return cls(token_ids, group_of_token)


@dataclass(frozen=True)
class Known:
    """What all groups know of B rows at one temperature.

    token_ids int32, logits float32 `[B, G, Rg]`, raw (before any cap), -1 and -inf for a pad;
    heavy int32 `[B, G, H]`: clusters, counted within the group; heavy_mass, heavy_count float32:
    log mass (-inf for none) and tokens of each. rest_mass, rest_count float32 `[B, G]`: of all
    other unprobed clusters together.
    """

    temperature: float
    token_ids: Tensor
    logits: Tensor
    heavy: Tensor
    heavy_mass: Tensor
    heavy_count: Tensor
    rest_mass: Tensor
    rest_count: Tensor


def know(
    head: FlashHead,
    hidden_states: Tensor,
    temperature: float,
    *,
    softcap: float = 0.0,
    scale: float = 1.0,
    draws: bool,
) -> Steps[Known]:
    """Probe, score, estimate, and exchange what the groups know of `hidden_states [B, D]`.

    softcap, scale: what becomes of logits, in this order. draws: probe as for a draw, not as for
    the best token.
    """
    shard = head.shard
    final = FinalLogits(softcap=softcap, temperature=temperature / scale)
    found = retrieve(head, hidden_states, final, head.sampling_probes if draws else head.num_probes)
    groups, mass = (len(hidden_states), len(shard.token_ids), -1), found.log_mass
    ids, logits = found.token_ids.reshape(groups), found.products.reshape(groups)
    heavy_mass, heavy = mass.topk(min(_HEAVY, mass.shape[2]), dim=2)
    rest = mass.scatter(2, heavy, -torch.inf)
    tokens = shard.num_tokens.expand_as(mass)
    parts = (
        logits,
        heavy_mass,
        tokens.gather(2, heavy).masked_fill(heavy_mass.isneginf(), 0).float(),
        rest.logsumexp(2, keepdim=True),
        tokens.masked_fill(rest.isneginf(), 0).sum(2, keepdim=True).float(),
    )
    words = [ids, heavy.int(), *(part.contiguous().view(torch.int32) for part in parts)]
    gathered = yield from _gather(torch.cat(words, dim=2), head)
    widths = [word.shape[2] for word in words]
    all_ids, all_heavy, *floats = torch.split(gathered, widths, dim=2)
    values = [part.contiguous().view(torch.float32) for part in floats]
    return Known(
        temperature, all_ids, values[0], all_heavy, values[1], values[2],
        values[3][..., 0], values[4][..., 0],
    )  # fmt: skip


def _gather(words: Tensor, head: FlashHead) -> Steps[Tensor]:
    """`words [B, N, w]` of every rank as `[B, G, w]`: rank r of P holds the groups r, r + P, ..."""
    if head.tp.tp_size == 1:
        return words
    width = -(-head.num_groups // head.tp.tp_size)
    padded = torch.nn.functional.pad(words, (0, 0, 0, width - words.shape[1]))
    gathered = yield Exchange(Operation.GATHER, padded.contiguous())  # [P, B, width, w]
    return gathered.permute(1, 2, 0, 3).flatten(1, 2)[:, : head.num_groups]


def make_rows(known: Known, logits: Tensor, where: VocabularyMap, rest: Rest) -> Tensor:
    """Rows float32 `[B, V]`.

    logits: `[B, G, Rg]`, the candidates' as the sampler is to see them. rest: what the others get.
    """
    ids = known.token_ids.flatten(1).long()
    pads = ids < 0
    flat = logits.flatten(1).float().masked_fill(pads, -torch.inf)
    best, place = flat.max(1, keepdim=True)
    best_id = ids.gather(1, place).clamp(min=0)
    # A pad repeats the best candidate, so that one scatter without a mask serves.
    ids, flat = torch.where(pads, best_id, ids), torch.where(pads, best, flat)
    if rest is Rest.CLUSTERS:
        rows = _by_cluster(known, best_id, where)
    else:
        level = _even(known, best) if rest is Rest.EVEN else best.new_full(best.shape, -torch.inf)
        rows = level.repeat(1, len(where.group_of_token))
    return rows.scatter_(1, ids, flat)


def _even(known: Known, best: Tensor) -> Tensor:
    """`[B, 1]`: all estimated mass over all tokens that have it, held below the best candidate."""
    mass = torch.cat([known.heavy_mass.flatten(1), known.rest_mass], dim=1).logsumexp(1)
    count = known.rest_count.sum(1) + known.heavy_count.flatten(1).sum(1)
    level = known.temperature * (mass - count.clamp(min=1).log()).unsqueeze(1)
    return torch.minimum(level, best - _BELOW * (1 + best.abs()))


def _by_cluster(known: Known, best_id: Tensor, where: VocabularyMap) -> Tensor:
    """`[B, V]`: each heavy cluster's level, and each group's for the tokens of all others."""
    counts = known.heavy_count
    levels = known.temperature * (known.heavy_mass - counts.clamp(min=1).log())  # [B, G, H]
    base = known.temperature * (known.rest_mass - known.rest_count.clamp(min=1).log())  # [B, G]
    rows = base.index_select(1, where.group_of_token)
    groups = torch.arange(base.shape[1], device=base.device).view(1, -1, 1)
    tokens = where.token_ids[groups, known.heavy.long()]  # [B, G, H, S]
    unused = (tokens < 0) | known.heavy_mass.isneginf().unsqueeze(3)
    tokens = torch.where(unused, best_id.view(-1, 1, 1, 1), tokens)
    spread = levels.unsqueeze(3).expand(tokens.shape).flatten(1)
    return rows.scatter_(1, tokens.flatten(1), spread)
