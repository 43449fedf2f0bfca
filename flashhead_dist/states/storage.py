"""Hidden states as a safetensors file.

Tensors `hidden_states [N, D]`, optional `source [N]` and `document [N]`; metadata `sources`, a
JSON list of names, and optional `origin`.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from flashhead_dist.models.cache import publish
from flashhead_dist.states.errors import HiddenStatesError
from flashhead_dist.states.states import HiddenStates, require_finite


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
        sources = [str(name) for name in json.loads(metadata.get("sources", "[]"))]
    except (SafetensorError, OSError, ValueError, TypeError) as error:
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
        sources=_source_names(path, sources, source_ids),
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


def _source_names(path: Path, sources: list[str], source_ids: torch.Tensor) -> tuple[str, ...]:
    least, most = int(source_ids.min()), int(source_ids.max())
    if not sources:
        sources = ["all"] if most == 0 else [f"source-{i}" for i in range(most + 1)]
    if least < 0 or most >= len(sources):
        raise HiddenStatesError(
            f"{path} has source {most if least >= 0 else least}, but its metadata names "
            f"{len(sources)} sources; list a name for every one in `sources`."
        )
    return tuple(sources)
