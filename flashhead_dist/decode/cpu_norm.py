"""Normalisation layers of a body that decodes a few tokens at a time on a CPU, in one call each."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flashhead_dist.models.quantized import replace_layers
from flashhead_kernels.cpu_norm import rms_norm

_FEW_VALUES = 1 << 16
"""More go to the layer itself, which has all threads at work."""
_PROBED_ROWS = 4
_TOLERANCE = 1e-5


class FusedNorm(nn.Module):
    """A float32 RMSNorm. plain: the layer in whose place it stands; scale: float32 `[D]`."""

    def __init__(self, plain: nn.Module, scale: Tensor, eps: float) -> None:
        super().__init__()
        self.plain = plain
        self.scale, self.eps = scale, eps

    def forward(self, states: Tensor) -> Tensor:
        """`[..., D]` of `[..., D]`."""
        if states.numel() > _FEW_VALUES or states.dtype is not torch.float32:
            result: Tensor = self.plain(states)
            return result
        return rms_norm(states, self.scale, self.eps)


def fuse_norms(model: nn.Module) -> int:
    """Have the float32 RMSNorm layers of `model` that are on a CPU computed in one call each.

    Models differ in whether they scale by the weight or by one more than it, and a class may be
    anything that its name does not say. So a layer is replaced only if one of the two gives what it
    gives on random states. Returns how many layers.
    """
    return replace_layers(model, _fused)


@torch.inference_mode()
def _fused(layer: nn.Module) -> FusedNorm | None:
    weight = getattr(layer, "weight", None)
    eps = getattr(layer, "eps", getattr(layer, "variance_epsilon", None))
    if (
        not type(layer).__name__.endswith("RMSNorm")
        or not isinstance(weight, Tensor)
        or not isinstance(eps, float)
        or weight.dim() != 1
        or weight.device.type != "cpu"
        or weight.dtype is not torch.float32
    ):
        return None
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(_PROBED_ROWS, len(weight), generator=generator)
    states *= torch.logspace(-4, 2, _PROBED_ROWS).unsqueeze(1)
    truth = layer(states)
    for scale in (weight.detach().clone(), 1 + weight.detach()):
        if torch.allclose(rms_norm(states, scale, eps), truth, rtol=_TOLERANCE, atol=_TOLERANCE):
            return FusedNorm(layer, scale, eps)
    return None
