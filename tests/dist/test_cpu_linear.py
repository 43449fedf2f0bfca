"""oneDNN in the place of MKL for float32 linear layers: the same numbers, the same weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flashhead_dist.decode.cpu_linear import OneDnnLinear, use_onednn
from flashhead_kernels.cpu_threads import compute_threads

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch was built without oneDNN"
)


@pytest.mark.parametrize("shape", [(1, 1, 33), (1, 7, 33), (3, 1, 33), (0, 1, 33)])
@pytest.mark.parametrize("bias", [True, False])
def test_it_gives_what_linear_gives(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(33, 70, bias=bias)
    inputs = torch.randn(shape)
    with torch.inference_mode():
        truth = nn.functional.linear(
            inputs.double(), linear.weight.double(), linear.bias.double() if bias else None
        )
        found = OneDnnLinear(linear, linear.weight)(inputs)
    torch.testing.assert_close(found.double(), truth, atol=1e-5, rtol=1e-5)


def test_only_float32_layers_change_and_keep_their_weights() -> None:
    class Odd(nn.Linear):
        """What another library makes of a linear layer."""

    model = nn.Sequential(
        nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4).bfloat16(), nn.Linear(4, 5)), Odd(5, 5)
    )
    weights = [layer.weight.clone() for layer in (model[0], model[1][1])]
    with compute_threads(2):
        assert use_onednn(model) == 2
    assert isinstance(model[0], OneDnnLinear)
    assert torch.equal(model[0].weight, weights[0])
    assert torch.equal(model[1][1].weight, weights[1])
    assert [type(item) for item in model[1]] == [nn.Linear, OneDnnLinear]
    assert type(model[2]) is Odd


def test_one_thread_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with compute_threads(1):
        assert use_onednn(model) == 0
    assert type(model[0]) is nn.Linear
