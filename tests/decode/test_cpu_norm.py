"""Norms in one call: the truth's numbers, and only for layers that are what they are taken for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from flashhead_dist.decode.cpu_norm import FusedNorm, fuse_norms
from flashhead_kernels.cpu_norm import rms_norm


class _Norm(nn.Module):
    def __init__(self, size: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size, dtype=dtype))
        self.eps = 1e-6

    def scaled(self, states: Tensor, scale: Tensor) -> Tensor:
        return states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + self.eps) * scale


class LlamaRMSNorm(_Norm):
    def forward(self, states: Tensor) -> Tensor:
        return self.scaled(states, self.weight)


class GemmaRMSNorm(_Norm):
    def forward(self, states: Tensor) -> Tensor:
        return self.scaled(states, 1 + self.weight)


class CenteredRMSNorm(_Norm):
    """Called an RMSNorm, and something else."""

    def forward(self, states: Tensor) -> Tensor:
        return self.scaled(states - states.mean(-1, keepdim=True), self.weight)


@pytest.mark.parametrize("shape", [(1, 1, 70), (2, 4, 640), (1, 7), (0, 64), (3, 0)])
def test_rms_norm_gives_the_truth(shape: tuple[int, ...]) -> None:
    """70 columns leave six over after steps of 64."""
    torch.manual_seed(0)
    states, weight = torch.randn(shape), torch.randn(shape[-1])
    wide = states.double()
    truth = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    torch.testing.assert_close(rms_norm(states, weight, 1e-6).double(), truth, rtol=1e-6, atol=1e-6)


def test_zeros_infinity_nan_and_strides() -> None:
    weight = torch.ones(64)
    assert torch.equal(rms_norm(torch.zeros(2, 64), weight, 1e-6), torch.zeros(2, 64))
    odd = torch.ones(2, 64)
    odd[0, 0], odd[1, 0] = float("inf"), float("nan")
    assert torch.equal(
        rms_norm(odd, weight, 1e-6).isnan(),
        nn.functional.rms_norm(odd, (64,), weight, 1e-6).isnan(),
    )
    across = torch.randn(64, 3).T
    torch.testing.assert_close(
        rms_norm(across, weight, 1e-6), nn.functional.rms_norm(across, (64,), weight, 1e-6)
    )


def test_layers_are_taken_by_what_they_give() -> None:
    """A scale by the weight where one more is meant, or a norm that centers, fails."""
    torch.manual_seed(0)
    model = nn.ModuleList(
        [LlamaRMSNorm(64), nn.ModuleList([GemmaRMSNorm(64)]), CenteredRMSNorm(64),
         LlamaRMSNorm(64, torch.bfloat16), nn.LayerNorm(64)]
    )  # fmt: skip
    states = torch.randn(1, 3, 64)
    before = [model[0](states), model[1][0](states)]
    assert fuse_norms(model) == 2
    for layer, truth in zip([model[0], model[1][0]], before, strict=True):
        assert isinstance(layer, FusedNorm)
        torch.testing.assert_close(layer(states), truth)
    assert [type(layer) for layer in model[2:]] == [CenteredRMSNorm, LlamaRMSNorm, nn.LayerNorm]


def test_many_states_go_to_the_layer_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.ModuleList([LlamaRMSNorm(64)])
    fuse_norms(model)
    monkeypatch.setattr(LlamaRMSNorm, "forward", lambda _, states: states * 7)
    assert torch.equal(model[0](torch.ones(1025, 64)), torch.full((1025, 64), 7.0))
    assert not torch.equal(model[0](torch.ones(1024, 64)), torch.full((1024, 64), 7.0))
