"""Hidden states for a made-up head: what it would be given, and what it hardly would."""

from __future__ import annotations

import torch
from torch import Tensor

from flashhead_dist.evaluate.robustness.made_heads import MadeHead
from flashhead_dist.states import HiddenStates

SOURCES = ("frequent", "any-token", "odd-rows", "no-token")
_TARGET_LOGIT = 30.0
_NOISE = 0.7
_COMMON = 0.5


def made_states(head: MadeHead, *, count: int, seed: int = 0) -> tuple[HiddenStates, HiddenStates]:
    """(calibration, test): `4 * count` and `count` a source.

    A state points to a token's row less the rows' mean, with noise of 0.7 of its length and half of
    it along the common vector, long enough for a logit of about 30: of tokens by Zipf's law
    (`frequent`, which alone calibrate), of any token alike, of rows that were made odd (where there
    are any), and of no token, noise alone.
    """
    draw = torch.Generator().manual_seed(seed)
    size = head.spec.vocab_size
    frequency = 1.0 / torch.arange(1, size + 1, dtype=torch.float64)
    order = torch.randperm(size, generator=draw)

    def frequent(wanted: int) -> Tensor:
        total = frequency.cumsum(0)
        uniform = torch.rand(wanted, generator=draw, dtype=torch.float64) * total[-1]
        return order[torch.searchsorted(total, uniform).clamp(max=size - 1)]

    calibration = _towards(head, frequent(4 * count), draw)
    parts = [
        _towards(head, frequent(count), draw),
        _towards(head, torch.randint(size, (count,), generator=draw), draw),
    ]
    names = [0, 1]
    if len(head.odd):
        some = head.odd[torch.randint(len(head.odd), (count,), generator=draw)]
        parts.append(_towards(head, some, draw))
        names.append(2)
    parts.append(_towards(head, None, draw, count))
    names.append(3)
    origin = f"made-up states for {head.model.name}, seed {seed}"
    return (
        HiddenStates(
            calibration,
            torch.zeros(len(calibration), dtype=torch.int64),
            SOURCES,
            f"{origin}, calibration part",
        ),
        HiddenStates(
            torch.cat(parts),
            torch.tensor(names).repeat_interleave(count),
            SOURCES,
            f"{origin}, test part",
        ),
    )


def _towards(
    head: MadeHead, tokens: Tensor | None, draw: torch.Generator, count: int = 0
) -> Tensor:
    """States bf16 `[n, D]` of `tokens [n]`, or `count` of none."""
    size = head.spec.hidden_size
    number = count if tokens is None else len(tokens)
    states: Tensor = torch.randn(number, size, generator=draw) * (_NOISE / size**0.5)
    if tokens is not None:
        mean = head.rows.float().mean(0)
        rows = head.rows[tokens].float() - mean
        states += rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)
    states += _COMMON * torch.randn(number, 1, generator=draw) * head.common
    scaled = states * (_TARGET_LOGIT / head.spec.norm)
    return scaled.to(torch.bfloat16)
