"""What becomes of a logit before tokens are compared: soft-capping, temperature, noise.

    final = softcap * tanh(h . row / softcap) / temperature  [+ Gumbel noise]

Soft-capping is Gemma 2's (arXiv 2408.00118, section 2). The greatest final logit with Gumbel noise
is a sample from the softmax of those without (Gumbel-max, Maddison et al., arXiv 1411.0030). The
noise is counter-based, keyed by (seed, sequence, position, token id), and so does not depend on who
scores a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`; from a CPU to CUDA without making the host wait.

    A copy from pageable memory waits for the stream. Torch keeps the pinned memory used here until
    the copy is done.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


_PHILOX_ROUNDS = 10
_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF
NEVER_ONE = 1 - 2**-24
"""Greatest float32 below 1."""


class Domain(IntEnum):
    """What noise is for: the last counter word, so that no two uses share a draw."""

    TOKEN = 0
    GROUP = 1
    CLUSTER = 2


@dataclass(frozen=True)
class GumbelNoise:
    """seed: int; positions: int32 or int64 `[B]`, the place of each row's token in its text.

    sequences: the number of each row's text, as positions; None: 0 for all.
    """

    seed: int
    positions: Tensor
    sequences: Tensor | None = None

    def rows(self, chosen: Tensor | slice) -> GumbelNoise:
        """The noise of some rows."""
        sequences = None if self.sequences is None else self.sequences[chosen]
        return GumbelNoise(self.seed, self.positions[chosen], sequences)

    def to(self, device: torch.device) -> GumbelNoise:
        """The same noise, to be made on `device`."""
        sequences = None if self.sequences is None else to_device(self.sequences, device)
        return GumbelNoise(self.seed, to_device(self.positions, device), sequences)


@dataclass(frozen=True)
class FinalLogits:
    """softcap: 0 for none; temperature: above 0; noise: None for the greatest logits.

    Raises:
        ValueError: a softcap below 0, a temperature not above 0.
    """

    softcap: float = 0.0
    temperature: float = 1.0
    noise: GumbelNoise | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.softcap < float("inf"):
            raise ValueError(
                f"softcap must be 0 (none) or a finite number above, got {self.softcap}"
            )
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature must be finite and above 0, got {self.temperature}")

    @property
    def is_plain(self) -> bool:
        """Whether final logits are the logits."""
        return self.softcap == 0 and self.temperature == 1 and self.noise is None

    def without_noise(self, logits: Tensor) -> Tensor:
        """Final logits of `logits` float32 `[...]`, as the softmax sees them."""
        if self.softcap:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits * (1 / self.temperature)

    def with_noise(self, final: Tensor, token_ids: Tensor) -> Tensor:
        """Add the noise of `token_ids [B, n]` to `final [B, n]`; as it is without noise."""
        if self.noise is None:
            return final
        return final + gumbel(self.noise, token_ids)


PLAIN = FinalLogits()


def gumbel(noise: GumbelNoise, token_ids: Tensor, domain: Domain = Domain.TOKEN) -> Tensor:
    """Gumbel noise float32 `[B, n]` of `token_ids [B, n]`; a pad's is as good as any.

    Philox4x32-10 (Salmon et al., 2011) with the seed as key and (token id, position, sequence,
    domain) as counter. With the first word w, the noise is `-log(-log(1 - v))` for
    `v = (2^32 - 1/2 - w) / 2^32`: v is small where the noise is great, and there float32 holds it
    to 24 bits, so that a token of probability 1e-9 comes about as often as it should (a uniform
    near 1 would end at 2^-24, and at infinity where it rounds to 1). Between -2.81 and 22.88.
    """
    ids = token_ids.to(torch.int64) & _WORD
    positions = noise.positions.to(torch.int64).unsqueeze(1).expand(ids.shape) & _WORD
    sequences = torch.zeros_like(positions)
    if noise.sequences is not None:
        sequences = noise.sequences.to(torch.int64).unsqueeze(1).expand(ids.shape) & _WORD
    word = _philox(noise.seed, ids, positions, sequences, torch.full_like(ids, domain))
    v = (((word ^ _WORD).float() + 0.5) * 2**-32).clamp(max=NEVER_ONE)
    return -torch.log(-torch.log1p(-v))


def _philox(seed: int, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> Tensor:
    """The first of the four words of each counter, int64 holding 32 bits."""
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(_PHILOX_ROUNDS):
        high0, low0 = _multiply(_PHILOX_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_PHILOX_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _PHILOX_KEY_STEPS[0]) & _WORD, (k1 + _PHILOX_KEY_STEPS[1]) & _WORD
    return c0


def _multiply(factor: int, words: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of `factor * words`, by halves since int64 has no unsigned product."""
    low = factor * (words & 0xFFFF)
    high = factor * (words >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)
