"""Real last hidden states of a model, from texts or from a file."""

from __future__ import annotations

from flashhead_dist.states.collect import (
    DEFAULT_MAX_TOKENS,
    collect_hidden_states,
    synthetic_hidden_states,
)
from flashhead_dist.states.files import (
    HiddenStates,
    HiddenStatesError,
    load_hidden_states,
    require_finite,
    require_hidden_size,
    save_hidden_states,
)

__all__ = [
    "DEFAULT_MAX_TOKENS",
    "HiddenStates",
    "HiddenStatesError",
    "collect_hidden_states",
    "load_hidden_states",
    "require_finite",
    "require_hidden_size",
    "save_hidden_states",
    "synthetic_hidden_states",
]
