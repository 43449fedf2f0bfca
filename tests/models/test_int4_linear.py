"""Packed four-bit layers against what compressed-tensors itself makes of the same weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flashhead_dist.models.quantized import FEW_ROWS, Int4Linear, settle_compressed, unpack_linears

quantization = pytest.importorskip("compressed_tensors.quantization")
compressors = pytest.importorskip("compressed_tensors.compressors")

OUT, IN = 48, 256
GROUPED: dict[str, Any] = {"strategy": "group", "group_size": 32, "symmetric": True}
STAY_PACKED: dict[str, dict[str, Any]] = {
    "groups of 32": GROUPED,
    "groups of 64, not symmetric": GROUPED | {"group_size": 64, "symmetric": False},
    "a scale a row": {"strategy": "channel", "symmetric": True},
    "a scale a row, not symmetric": {"strategy": "channel", "symmetric": False},
}
UNPACKED: dict[str, dict[str, Any]] = {
    "eight bits": GROUPED | {"num_bits": 8},
    "groups that no kernel takes": GROUPED | {"group_size": 16},
}


def compressed(bias: bool = True, **settings: Any) -> nn.Sequential:
    """A layer `[48, 256]` as transformers has it after loading a checkpoint of such settings."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(IN, OUT, bias=bias)).to(torch.bfloat16).requires_grad_(False)
    args = quantization.QuantizationArgs(**({"num_bits": 4, "type": "int"} | settings))
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=args)
    config = quantization.QuantizationConfig(config_groups={"group_0": scheme})
    quantization.apply_quantization_config(model, config)
    layer: Any = model[0]
    columns = settings.get("group_size") or IN
    groups = layer.weight.float().unflatten(-1, (-1, columns))
    scales, zeros = quantization.utils.calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    layer.weight_scale.copy_(scales)
    if hasattr(layer, "weight_zero_point"):
        layer.weight_zero_point.copy_(zeros)
    compressors.ModelCompressor.from_pretrained_model(model).compress_model(model)
    assert hasattr(layer, "weight_packed")
    return model


def rows(count: int) -> Tensor:
    return torch.randn(count, IN, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("settings", STAY_PACKED.values(), ids=list(STAY_PACKED))
@pytest.mark.parametrize("count", [1, 5, FEW_ROWS + 1])
def test_a_packed_layer_gives_what_the_decompressed_one_gives(
    settings: dict[str, Any], count: int
) -> None:
    model = compressed(**settings)
    truth = copy.deepcopy(model)
    compressors.ModelCompressor.from_pretrained_model(truth).decompress_model(truth)
    assert settle_compressed(model) == (1, 0)
    layer = model[0]
    assert isinstance(layer, Int4Linear)
    weights = truth[0].weight.float()  # rounded to bfloat16 by the library
    # Swapped halves of a byte, or a shift of the wrong sign, are off by whole steps of 1/8.
    assert (layer.unpacked(torch.float32) - weights).abs().max() <= weights.abs().max() * 2**-8
    inputs = rows(count)
    expected = inputs.double() @ weights.double().T + layer.bias.double()
    size = inputs.double().abs() @ weights.double().abs().T
    for dtype in (torch.bfloat16, torch.float32):
        found = layer(inputs.to(dtype).view(count, 1, IN))
        assert found.dtype is dtype
        assert found.shape == (count, 1, OUT)
        error = (found.view(count, OUT).double() - expected).abs()
        # Inputs, weights and the result are each rounded to bfloat16 at most once.
        assert (error <= 3 * 2**-8 * (size / IN**0.5 + expected.abs())).all()


@pytest.mark.parametrize("settings", UNPACKED.values(), ids=list(UNPACKED))
def test_layers_of_other_schemes_become_ordinary_ones(settings: dict[str, Any]) -> None:
    model = compressed(**settings)
    truth = copy.deepcopy(model)
    compressors.ModelCompressor.from_pretrained_model(truth).decompress_model(truth)
    assert settle_compressed(model) == (0, 1)
    assert type(model[0]) is nn.Linear
    assert torch.equal(model[0].weight, truth[0].weight)
    inputs = rows(2).to(torch.bfloat16)
    assert torch.equal(model(inputs), truth(inputs))


def test_columns_in_activation_order_are_not_taken_for_neighbours() -> None:
    model = compressed(**GROUPED)
    model[0].weight_g_idx = nn.Parameter(torch.arange(IN) % 8, requires_grad=False)
    assert settle_compressed(model) == (0, 1)


def test_unpacking_leaves_ordinary_layers_of_the_same_weights() -> None:
    model = compressed(**GROUPED)
    settle_compressed(model)
    weights, bias = model[0].unpacked(torch.float32), model[0].bias
    assert unpack_linears(model, torch.float32) == 1
    assert type(model[0]) is nn.Linear
    assert torch.equal(model[0].weight, weights)
    assert torch.equal(model[0].bias, bias)
    assert unpack_linears(model, torch.float32) == 0


def test_sizes_that_do_not_fit_are_refused() -> None:
    packed = torch.zeros(32, 64, dtype=torch.uint8)
    with pytest.raises(ValueError, match="do not fit"):
        Int4Linear(packed, torch.ones(32, 8), None, None)
    with pytest.raises(ValueError, match="do not fit"):
        Int4Linear(packed[:20], torch.ones(20, 2), None, None)
