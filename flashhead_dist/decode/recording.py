"""KV caches that can be taken back by tokens, on every supported version of transformers.

Also where a padded batch's tokens stand: what a whole body and a pipeline stage feed alike.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from flashhead_dist.errors import UserError


def new_cache(config: Any, *, recording: bool) -> Any:
    """An empty KV cache for the layers of `config`, a transformers decoder's.

    recording: `record_past` is to be called on it.

    Raises:
        UserError: recording a state that cannot be rolled back.
    """
    from transformers import DynamicCache

    cache = DynamicCache(config=config)
    if recording and not cache.is_croppable:
        raise UserError(
            f"a {config.model_type} model keeps a state that cannot be rolled back, so lossless "
            "mode cannot serve it: leave it out"
        )
    return cache


def token_positions(attention_mask: Tensor, num_fed: int) -> Tensor:
    """Positions int64 `[B, num_fed]` of the last tokens under a left-padded mask `[B, n]`."""
    return (attention_mask.cumsum(1) - 1).clamp(min=0)[:, -num_fed:]


def record_past(cache: Any) -> None:
    """Make a transformers cache keep what `cache.crop(-n)` needs, from its next token on.

    To be called after the prompt, or a sliding window would keep all of it until the first crop.

    In transformers 5.17 a sliding layer that records shows attention all that it keeps, however
    long that has grown since the last crop, while the mask is as wide as the window; in 5.23 it
    shows the window.
    """
    cache.activate_past_recording()
    for layer in cache.layers:
        if getattr(layer, "is_sliding", False):
            layer.update = partial(_update_and_show_window, layer)


def _update_and_show_window(
    layer: Any, key_states: Tensor, value_states: Tensor, *arguments: Any, **options: Any
) -> tuple[Tensor, Tensor]:
    """`layer.update`, its answers `[B, heads, tokens, head size]` no longer than its mask."""
    keys, values = type(layer).update(layer, key_states, value_states, *arguments, **options)
    visible = layer.sliding_window - 1 + key_states.shape[-2]
    return keys[:, :, -visible:], values[:, :, -visible:]
