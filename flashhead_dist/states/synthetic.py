"""Made-up hidden states for a synthetic model, named as such."""

from __future__ import annotations

import torch

from flashhead_dist.models import ModelSource
from flashhead_dist.states.states import HiddenStates

_ROWS_AT_ONCE = 16384
_GAIN = 40.0
_NOISE = 0.7


def synthetic_hidden_states(
    model: ModelSource, *, num_states: int = 8192, seed: int = 0
) -> tuple[HiddenStates, HiddenStates]:
    """(calibration, test), `num_states` each: noisy copies of rows whose tokens follow Zipf's law.

    The gain leaves the softmax neither flat nor certain. Streams the embedding once.
    """
    draw = torch.Generator().manual_seed(seed)
    total = 2 * num_states
    frequency = 1.0 / torch.arange(1, model.vocab_size + 1, dtype=torch.float64)
    # torch.multinomial takes at most 2**24 categories; inverting the cumulative sum takes any.
    cumulative = frequency.cumsum(0)
    uniform = torch.rand(total, generator=draw, dtype=torch.float64) * cumulative[-1]
    tokens = torch.searchsorted(cumulative, uniform).clamp_(max=model.vocab_size - 1)
    # Frequent tokens lie anywhere in the vocabulary, not at its start alone.
    tokens = torch.randperm(model.vocab_size, generator=draw)[tokens]
    states = torch.randn(total, model.hidden_size, generator=draw)
    states *= _NOISE / model.hidden_size**0.5
    for start in range(0, model.vocab_size, _ROWS_AT_ONCE):
        stop = min(start + _ROWS_AT_ONCE, model.vocab_size)
        here = (tokens >= start) & (tokens < stop)
        if bool(here.any()):
            rows = model.read_rows(start, stop).float()[tokens[here] - start]
            states[here] += rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-6)
    states = (states * _GAIN).to(torch.bfloat16)
    calibration, test = (
        HiddenStates(
            states=half,
            source_ids=torch.zeros(num_states, dtype=torch.int64),
            sources=("synthetic",),
            origin=f"synthetic states for {model.name}, seed {seed}, {part} part",
        )
        for half, part in zip(torch.split(states, num_states), ("calibration", "test"), strict=True)
    )
    return calibration, test
