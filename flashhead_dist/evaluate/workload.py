"""What heads are measured on: a model, its index, and test states with the dense head's answers.

Made ready on one rank, which has the whole machine, and handed to the others as text.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from flashhead_dist.bench.agreement import spread_over_sources
from flashhead_dist.errors import UserError
from flashhead_dist.evaluate.truth import dense_truth
from flashhead_dist.heads.registry import needs_index
from flashhead_dist.index import ensure_index, load_manifest
from flashhead_dist.models import ModelSource, open_model
from flashhead_dist.states import (
    HiddenStates,
    collect_hidden_states,
    load_hidden_states,
    require_hidden_size,
    synthetic_hidden_states,
)

_NUM_TIMING_STATES = 256


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a user asked to measure; None stands for the default."""

    heads: Sequence[str]
    model: str | None = None
    synthetic: str | None = None
    dtype: torch.dtype | None = None
    index: Path | None = None
    hidden_states: Path | None = None
    max_states: int = 1024
    """Test states for agreement; 0 leaves agreement out."""
    seed: int = 0
    """Of made-up hidden states."""

    def open_model(self, *, progress: bool) -> ModelSource:
        """The model; raises UserError where there is none."""
        return open_model(self.model, synthetic=self.synthetic, dtype=self.dtype, progress=progress)


@dataclass(frozen=True)
class Workload:
    """states `[N, D]`, source_ids `[N]` into `sources`; dense_ids `[N]`, None where not asked for.

    index_dir and index_hash are None where no head needs an index.
    """

    index_dir: Path | None
    index_hash: str | None
    states: Tensor
    source_ids: Tensor
    sources: tuple[str, ...]
    dense_ids: Tensor | None
    origin: str

    def as_json(self) -> dict[str, Any]:
        """A form that passes between ranks as text."""
        tensors = {"states": self.states.contiguous(), "source_ids": self.source_ids.contiguous()}
        if self.dense_ids is not None:
            tensors["dense_ids"] = self.dense_ids.contiguous()
        return {
            "index_dir": None if self.index_dir is None else str(self.index_dir),
            "index_hash": self.index_hash,
            "tensors": base64.b64encode(save(tensors)).decode(),
            "sources": json.dumps(self.sources),
            "origin": self.origin,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Workload:
        """Read what `as_json` wrote."""
        tensors = load(base64.b64decode(value["tensors"]))
        return cls(
            index_dir=None if value["index_dir"] is None else Path(value["index_dir"]),
            index_hash=value["index_hash"],
            states=tensors["states"],
            source_ids=tensors["source_ids"],
            sources=tuple(json.loads(value["sources"])),
            dense_ids=tensors.get("dense_ids"),
            origin=value["origin"],
        )


def prepare_workload(request: Request, max_tp_size: int, *, progress: bool) -> Workload:
    """Fetch, build and compute whatever is missing; everything is cached for the next run.

    Raises:
        UserError: something named is missing, damaged or does not fit, or the vocabulary has fewer
            tokens than `max_tp_size`.
    """
    model = request.open_model(progress=progress)
    if model.vocab_size < max_tp_size:
        raise UserError(
            f"the vocabulary of {model.name} has {model.vocab_size} tokens, fewer than tp_size "
            f"{max_tp_size}: use --tp-sizes of {model.vocab_size} or less"
        )
    test = _test_states(request, model, progress)
    require_hidden_size(test, model.hidden_size, model.name)
    index_dir, index_hash = request.index, None
    if index_dir is None and any(needs_index(name) for name in request.heads):
        index_dir = ensure_index(model, progress=progress)
    if index_dir is not None:
        index_hash = load_manifest(index_dir).index_hash
    selection = spread_over_sources(test.source_ids, request.max_states or _NUM_TIMING_STATES)
    states = test.states[selection]
    dense_ids: Tensor | None = None
    if request.max_states:
        dense_ids = dense_truth(model, states, progress=progress).token_ids[:, 0].to(torch.int64)
    return Workload(
        index_dir=index_dir,
        index_hash=index_hash,
        states=states,
        source_ids=test.source_ids[selection],
        sources=test.sources,
        dense_ids=dense_ids,
        origin=test.origin,
    )


def _test_states(request: Request, model: ModelSource, progress: bool) -> HiddenStates:
    if request.hidden_states is not None:
        return load_hidden_states(request.hidden_states)
    if model.synthetic:
        return synthetic_hidden_states(model, seed=request.seed)[1]
    return collect_hidden_states(model, progress=progress)[1]
