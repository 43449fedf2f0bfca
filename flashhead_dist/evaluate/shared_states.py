"""Test states and the dense head's answers to them, made on one rank and handed to the others."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from flashhead_dist.evaluate.truth import dense_truth
from flashhead_dist.hidden_states import HiddenStates
from flashhead_dist.measure.agreement import spread_over_sources
from flashhead_dist.model_source import ModelSource


@dataclass(frozen=True)
class SharedStates:
    """states `[N, D]`, source_ids `[N]` into `sources`, dense_ids `[N]` or None where not asked."""

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
            "tensors": base64.b64encode(save(tensors)).decode(),
            "sources": json.dumps(self.sources),
            "origin": self.origin,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> SharedStates:
        """Read what `as_json` wrote."""
        tensors = load(base64.b64decode(value["tensors"]))
        return cls(
            tensors["states"],
            tensors["source_ids"],
            tuple(json.loads(value["sources"])),
            tensors.get("dense_ids"),
            value["origin"],
        )


def select_test_states(
    model: ModelSource, test: HiddenStates, max_states: int, *, progress: bool
) -> SharedStates:
    """At most `max_states` of the test states, evenly over sources, with the dense head's answers.

    With `max_states` 0 a few states are taken to time with, and no answers.
    """
    selection = spread_over_sources(test.source_ids, max_states or 64)
    states = test.states[selection]
    dense_ids: Tensor | None = None
    if max_states:
        dense_ids = dense_truth(model, states, progress=progress).token_ids[:, 0].to(torch.int64)
    return SharedStates(states, test.source_ids[selection], test.sources, dense_ids, test.origin)
