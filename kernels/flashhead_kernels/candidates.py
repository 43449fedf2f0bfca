"""What every head kernel returns, and the checks that stand before all of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Candidates:
    """The best tokens that one rank has seen, per row of the batch.

    keys: int64 `[B, k]`, descending, EMPTY_KEY where the rank scored fewer than k tokens.
    logsumexp: float32 `[B]` or None where it was not asked for. For a retrieval kernel it is the
        closed form over the rank's whole vocabulary shard (see `flashhead_candidates`).
    unprobed: int64 `[B]` or None where it was not asked for. `pack_keys` of the greatest probing
        score of a cluster that was not probed, with id 0; EMPTY_KEY where all were.
    token_ids, logits: the keys unpacked, int64 and float32 `[B, k]`, where the kernel did that too.
    """

    keys: Tensor
    logsumexp: Tensor | None
    unprobed: Tensor | None = None
    token_ids: Tensor | None = None
    logits: Tensor | None = None


def check_finite(hidden_states: Tensor) -> None:
    """Refuse hidden states `[B, D]` that no argmax is defined for.

    Raises:
        ValueError: names the first row that holds NaN or inf.
    """
    finite = torch.isfinite(hidden_states).all(dim=-1)
    if not bool(finite.all()):
        row = int((~finite).nonzero()[0, 0])
        kind = "NaN" if bool(torch.isnan(hidden_states[row]).any()) else "inf"
        raise ValueError(f"hidden state {row} holds {kind}")


def quantize_hidden_states(hidden_states: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Round `hidden_states [B, D]` to int8, with a float32 scale for each `group_size` columns.

    Integer centroids are scored by integer dot products: exact, so any order of summation will do.

    Returns:
        `(integers int8 [B, D], scales float32 [B, D / group_size])`.
    """
    batch, hidden_size = hidden_states.shape
    grouped = hidden_states.float().reshape(batch, hidden_size // group_size, group_size)
    scales = grouped.abs().amax(-1) / 127
    divisor = scales.unsqueeze(-1)
    quotient = torch.where(divisor > 0, grouped / divisor, torch.zeros_like(grouped))
    return quotient.round().clamp(-127, 127).to(torch.int8).flatten(-2), scales


def check_candidate_arguments(
    hidden_states: Tensor, hidden_size: int, num_probes_per_group: int, clusters: int, k: int
) -> None:
    """Raise ValueError where shapes or counts cannot be served."""
    if hidden_states.ndim != 2 or hidden_states.shape[1] != hidden_size:
        raise ValueError(
            f"hidden states of shape {tuple(hidden_states.shape)} do not fit [B, {hidden_size}]"
        )
    if not 1 <= num_probes_per_group <= clusters:
        raise ValueError(
            f"probes per group must lie between 1 and {clusters}, got {num_probes_per_group}"
        )
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
