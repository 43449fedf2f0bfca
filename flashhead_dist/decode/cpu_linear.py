"""Float32 linear layers of a body on a CPU, on all its threads.

For one token at a time torch hands a float32 linear layer to MKL, which uses one thread for it
whatever `torch.get_num_threads()` says. oneDNN, which torch carries as well, uses all: a step of
Gemma-3-270M's body takes 29 ms in place of 39 on two cores (torch 2.13), and 26 with its weights on
large pages, as the heads' are. Every head decodes over the same body.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from flashhead_kernels.cpu_memory import empty_on_large_pages

_BLOCK_BYTES = 1 << 25
_ALIGNMENT = 16
"""Values that a layer's weights begin at a multiple of: a cache line."""

_Place = tuple[nn.Module, str, nn.Linear]


class OneDnnLinear(nn.Module):
    """An `nn.Linear` in float32, computed by oneDNN.

    weight: `[out_features, in_features]`, the layer's own values.
    """

    def __init__(self, linear: nn.Linear, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, inputs: Tensor) -> Tensor:
        """`[..., out_features]` of float32 `[..., in_features]`."""
        if inputs.numel() != self.in_features:
            # Several rows are a matrix product, for which MKL has all threads at work.
            return nn.functional.linear(inputs, self.weight, self.bias)
        compute: Any = torch.ops.mkldnn._linear_pointwise
        result: Tensor = compute(inputs, self.weight, self.bias, "none", [], "")
        return result


def use_onednn(model: nn.Module) -> int:
    """Let oneDNN compute the float32 `nn.Linear` layers of `model` that are on a CPU.

    Their weights move to large pages, some megabytes at a time. Returns how many layers: none where
    torch was built without oneDNN, or with a single thread, which MKL uses as well.
    """
    available: Any = torch.backends.mkldnn.is_available
    if not available() or torch.get_num_threads() == 1:
        return 0
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear
        and child.weight.device.type == "cpu"
        and child.weight.dtype == torch.float32
    ]
    for places in _blocks(found):
        _move(places)
    return len(found)


def _move(places: list[_Place]) -> None:
    """Replace some layers by others, whose weights lie in one block."""
    block = empty_on_large_pages((sum(_room(layer) for _, _, layer in places),), torch.float32)
    start = 0
    for parent, name, layer in places:
        weight = block[start : start + layer.weight.numel()].view(layer.weight.shape)
        weight.copy_(layer.weight.detach())
        setattr(parent, name, OneDnnLinear(layer, weight))
        start += _room(layer)


def _blocks(places: list[_Place]) -> Iterator[list[_Place]]:
    block: list[_Place] = []
    for place in places:
        block.append(place)
        if sum(layer.weight.nbytes for _, _, layer in block) >= _BLOCK_BYTES:
            yield block
            block = []
    if block:
        yield block


def _room(layer: nn.Linear) -> int:
    return -(-layer.weight.numel() // _ALIGNMENT) * _ALIGNMENT
