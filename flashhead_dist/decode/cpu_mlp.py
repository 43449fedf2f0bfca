"""Gated feed-forward layers that decode one token at a time on a CPU, in two products each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flashhead_dist.decode.cpu_linear import StreamedLinear, stacked
from flashhead_dist.models.quantized import replace_layers

_TOLERANCE = 1e-4


class FusedMlp(nn.Module):
    """`down(act(gate(x)) * up(x))`, gate and up as one product (Shazeer, "GLU Variants", 2020).

    plain: the layer in whose place it stands, which still serves more than one token.
    """

    def __init__(self, plain: Any, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.plain = plain
        self._weight, self._bias = weight, bias
        self._act, self._down = plain.act_fn, plain.down_proj

    def forward(self, states: Tensor) -> Tensor:
        """`[..., D]` of `[..., D]`."""
        if states.numel() != self._weight.shape[1] or states.dtype is not torch.float32:
            result: Tensor = self.plain(states)
            return result
        both = self._down.crew.multiply(self._weight, states.contiguous(), self._down.weight)
        if self._bias is not None:
            both += self._bias
        gate, up = both.view(2, 1, -1)
        product: Tensor = self._down(self._act(gate).mul_(up))
        return product.view(states.shape)


def fuse_mlps(model: nn.Module) -> int:
    """Have one-token steps of the gated feed-forward layers of `model` computed in two products.

    Only float32 layers whose projections are a crew's (`stream_linears` comes first), and that give
    what the two products give. Returns how many layers.
    """
    return replace_layers(model, _fused)


@torch.inference_mode()
def _fused(layer: Any) -> FusedMlp | None:
    names = ("gate_proj", "up_proj", "down_proj")
    linears: list[Any] = [getattr(layer, name, None) for name in names]
    if (
        isinstance(layer, FusedMlp)
        or not callable(getattr(layer, "act_fn", None))
        or not all(isinstance(linear, StreamedLinear) for linear in linears)
        or linears[0].weight.dtype is not torch.float32
    ):
        return None
    joined = stacked(linears[:2])
    if joined is None:
        return None
    fused = FusedMlp(layer, *joined)
    generator = torch.Generator().manual_seed(0)
    state = torch.randn(1, 1, linears[0].in_features, generator=generator)
    truth = layer(state)
    same = torch.allclose(
        fused(state), truth, rtol=_TOLERANCE, atol=_TOLERANCE * float(truth.std())
    )
    return fused if same else None
