"""Top-1 agreement of a head with the dense head on test hidden states, overall and at its worst."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flashhead_dist.heads.base import Head


@dataclass(frozen=True)
class Agreement:
    """Share of states on which the head's best token is the dense head's."""

    overall: float
    worst: float
    worst_source: str
    num_worst_states: int
    """States of the worst source."""
    num_states: int


def top1_agreement(
    token_ids: Tensor, dense_ids: Tensor, source_ids: Tensor, sources: Sequence[str]
) -> Agreement:
    """Compare `token_ids [N]` with `dense_ids [N]`, by `source_ids [N]` into `sources`.

    Raises:
        ValueError: no state.
    """
    if token_ids.numel() == 0:
        raise ValueError("agreement needs at least one state")
    same = (token_ids == dense_ids).to(torch.float64)
    by_source = {
        sources[int(source)]: float(same[source_ids == source].mean())
        for source in torch.unique(source_ids)
    }
    worst_source = min(by_source, key=lambda name: (by_source[name], name))
    num_worst = int((source_ids == list(sources).index(worst_source)).sum())
    return Agreement(
        float(same.mean()), by_source[worst_source], worst_source, num_worst, same.numel()
    )


def spread_over_sources(source_ids: Tensor, max_states: int) -> Tensor:
    """Indices of at most `max_states` states, as evenly over the sources as these allow.

    Takes the first state of every source, then the second, and so on; the result is sorted. The
    same for the same input, whatever the machine.
    """
    rank_in_source = torch.empty_like(source_ids)
    for source in torch.unique(source_ids):
        members = (source_ids == source).nonzero().flatten()
        rank_in_source[members] = torch.arange(len(members), dtype=source_ids.dtype)
    order = torch.argsort(rank_in_source, stable=True)
    return order[:max_states].sort().values


def best_tokens(head: Head, hidden_states: Tensor, chunk_size: int = 64) -> Tensor:
    """The head's best token of each of `hidden_states [N, D]`, as int64 `[N]` on the CPU."""
    chunks = [
        head.forward(chunk).token_ids[:, 0] for chunk in torch.split(hidden_states, chunk_size)
    ]
    return torch.cat(chunks).cpu()
