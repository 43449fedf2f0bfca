"""Layers of a model replaced by others that serve in their place."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn


def replace_layers(model: nn.Module, replacement: Callable[[nn.Module], nn.Module | None]) -> int:
    """Put `replacement(layer)` in the place of each layer of `model` for which there is one.

    Returns how many.
    """
    count = 0
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            found = replacement(layer)
            if found is not None:
                setattr(parent, name, found)
                count += 1
    return count
