"""Hidden states with the source of each, and their safetensors file.

Tensors `hidden_states [N, D]`, optional `source [N]` and `document [N]`; metadata `sources`, a JSON
list of names, and optional `origin`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from flashhead_dist.errors import UserError
from flashhead_dist.models.cache import publish


class HiddenStatesError(UserError):
    """Hidden states cannot be had from what the user named."""


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


def save_hidden_states(path: Path, hidden_states: HiddenStates) -> None:
    """Write the file under a temporary name and rename it.

    Raises UserError on a full disk or an unwritable folder.
    """
    tensors = {
        "hidden_states": hidden_states.states.contiguous(),
        "source": hidden_states.source_ids.contiguous(),
    }
    if hidden_states.documents is not None:
        tensors["document"] = hidden_states.documents.contiguous()
    metadata = {"sources": json.dumps(hidden_states.sources), "origin": hidden_states.origin}

    def write(temporary: Path) -> None:
        save_file(tensors, temporary, metadata)
        temporary.chmod(0o644)

    publish(path, write)


def load_hidden_states(path: Path) -> HiddenStates:
    """Read a file that `save_hidden_states` or a user wrote; without `source`, all are one.

    Raises HiddenStatesError where it is missing, damaged, of the wrong shape, or not finite.
    """
    if not path.is_file():
        raise HiddenStatesError(
            f"The hidden states {path} do not exist; give a safetensors file with a tensor "
            "hidden_states [N, D]."
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise HiddenStatesError(
            f"{path} is no readable safetensors file of hidden states ({error}); write it again."
        ) from error
    states = _states(path, tensors)
    source_ids = _one_per_row(path, "source", tensors, states)
    if source_ids is None:
        source_ids = torch.zeros(len(states), dtype=torch.int64)
    return HiddenStates(
        states=states,
        source_ids=source_ids,
        sources=_source_names(path, metadata.get("sources", "[]"), source_ids),
        origin=metadata.get("origin", str(path)),
        documents=_one_per_row(path, "document", tensors, states),
    )


def _states(path: Path, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    states = tensors.get("hidden_states")
    if states is None or states.dim() != 2 or not states.is_floating_point() or not len(states):
        found = "no such tensor" if states is None else f"{states.dtype} {tuple(states.shape)}"
        raise HiddenStatesError(
            f"{path} needs a floating-point tensor hidden_states [N, D] with N >= 1 and holds "
            f"{found}; write it again."
        )
    require_finite(states, str(path))
    return states


def _one_per_row(
    path: Path, name: str, tensors: dict[str, torch.Tensor], states: torch.Tensor
) -> torch.Tensor | None:
    values = tensors.get(name)
    if values is None:
        return None
    if values.shape != states.shape[:1] or values.is_floating_point():
        raise HiddenStatesError(
            f"The tensor {name} of {path} must hold {len(states)} integers and is {values.dtype} "
            f"{tuple(values.shape)}; write it again."
        )
    return values.long()


def _source_names(path: Path, stored: str, source_ids: torch.Tensor) -> tuple[str, ...]:
    try:
        sources = json.loads(stored)
    except ValueError:
        sources = None
    if not isinstance(sources, list) or not all(isinstance(name, str) for name in sources):
        raise HiddenStatesError(
            f"The metadata `sources` of {path} is {stored!r}: it must be a JSON list of names such "
            """as ["en", "code"]; write it so, or leave it out."""
        )
    least, most = int(source_ids.min()), int(source_ids.max())
    if not sources:
        sources = ["all"] if most == 0 else [f"source-{i}" for i in range(most + 1)]
    if least < 0 or most >= len(sources):
        raise HiddenStatesError(
            f"{path} has source {most if least >= 0 else least}, but its metadata names "
            f"{len(sources)} sources; list a name for every one in `sources`."
        )
    return tuple(sources)
