"""Hidden states with the source of each: what calibrates an index, and what tests a head."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from flashhead_dist.states.errors import HiddenStatesError


@dataclass(frozen=True)
class HiddenStates:
    """Last hidden states, after the final norm: what the output head is given.

    states      [N, D] floating point
    source_ids  [N] int64, indices into `sources`
    sources     short names: a language code, "mathematics", "code"
    origin      one line that says where the states come from
    documents   [N] int64, the same number for states of one text; None where unknown
    """

    states: torch.Tensor
    source_ids: torch.Tensor
    sources: tuple[str, ...]
    origin: str
    documents: torch.Tensor | None = None

    def __post_init__(self) -> None:
        n = self.states.shape[0]
        if self.states.dim() != 2 or not self.states.is_floating_point():
            raise ValueError(f"states must be floating point [N, D], not {self.states.shape}")
        if self.source_ids.shape != (n,):
            raise ValueError(f"source_ids must be [{n}], not {tuple(self.source_ids.shape)}")
        if self.documents is not None and self.documents.shape != (n,):
            raise ValueError(f"documents must be [{n}], not {tuple(self.documents.shape)}")
        if n and not 0 <= int(self.source_ids.min()) <= int(self.source_ids.max()) < len(
            self.sources
        ):
            raise ValueError(f"source_ids must lie in [0, {len(self.sources)})")

    def __len__(self) -> int:
        return self.states.shape[0]

    @property
    def hidden_size(self) -> int:
        """D."""
        return self.states.shape[1]

    def subset(self, rows: torch.Tensor) -> HiddenStates:
        """The states that an index tensor [n] or a boolean mask [N] picks; source names stay."""
        return replace(
            self,
            states=self.states[rows],
            source_ids=self.source_ids[rows],
            documents=None if self.documents is None else self.documents[rows],
        )

    def counts(self) -> dict[str, int]:
        """Number of states of each source that has any."""
        counted = torch.bincount(self.source_ids, minlength=len(self.sources)).tolist()
        return {name: n for name, n in zip(self.sources, counted, strict=True) if n}


def require_finite(states: torch.Tensor, where: str) -> None:
    """Raise HiddenStatesError naming the first row of `states` [N, D] with a NaN or infinity."""
    finite = torch.isfinite(states).all(dim=1)
    if not bool(finite.all()):
        row = int((~finite).nonzero()[0, 0])
        raise HiddenStatesError(
            f"{where} holds NaN or infinity, first in row {row}; recompute the hidden states, in "
            "bf16 or fp32 if they overflowed in fp16."
        )


def require_hidden_size(hidden_states: HiddenStates, hidden_size: int, model: str) -> None:
    """Raise HiddenStatesError unless the states are as wide as `model` is."""
    if hidden_states.hidden_size != hidden_size:
        raise HiddenStatesError(
            f"{hidden_states.origin} holds hidden states of size {hidden_states.hidden_size}, but "
            f"{model} has hidden size {hidden_size}; give the states of this model."
        )
