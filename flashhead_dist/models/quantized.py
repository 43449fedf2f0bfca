"""Linear layers whose weights stay in four bits: W4A16, a scale for each group of input columns.

`W[o, i] = (q[o, i] - 8) * scale[o, i // g] + shift[o, i // g]` with q in 0 to 15, as GPTQ
(arXiv 2210.17323) and AWQ (arXiv 2306.00978) checkpoints have it. On a CPU a few rows go to torch's
own kernel for it (`aten::_weight_int4pack_mm_for_cpu`), which is quick in bfloat16 alone: there
activations are rounded to bfloat16, whatever the model's dtype, and summed in float32. More rows
are multiplied by weights that are unpacked for the purpose.

`settle_compressed` makes such layers of a checkpoint that compressed-tensors wrote. transformers
loads one with a hook that makes every layer dense at the first call of the model, and a decoder
that is called by itself has no weights at all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

FEW_ROWS = 16
"""More rows in one call cost torch's kernel more than unpacking does."""
GROUP_SIZES = (256, 128, 64, 32)
"""Columns of one scale that torch's kernel takes."""
ROW_MULTIPLE = 16
"""Of which torch's kernel wants the number of output features to be a multiple."""
_MIDDLE = 8

_BITS = 4

_ops: Any = torch.ops.aten


class Int4Linear(nn.Module):
    """`nn.Linear` over packed weights; on another device than a CPU it unpacks them at each call.

    The weights are held twice: as the checkpoint has them, and in the order of torch's kernel.
    Together that is a byte a weight.
    """

    def __init__(
        self, packed: Tensor, scales: Tensor, shifts: Tensor | None, bias: Tensor | None
    ) -> None:
        """packed: uint8 `[out, in / 2]`, the even column in the low half of a byte; scales, shifts:
        `[out, in / g]`, of a size in GROUP_SIZES; bias: `[out]`, in the model's dtype.

        Raises:
            ValueError: sizes that torch's kernel does not take.
        """
        super().__init__()
        self.out_features, half = packed.shape
        self.in_features = 2 * half
        self.group_size, rest = divmod(self.in_features, scales.shape[1])
        if rest or self.group_size not in GROUP_SIZES or self.out_features % ROW_MULTIPLE:
            raise ValueError(f"{tuple(packed.shape)} with scales {tuple(scales.shape)} do not fit")
        self.bias = bias
        self.register_buffer("packed", packed.contiguous())
        self.register_buffer("scales", scales)
        self.register_buffer("shifts", shifts)
        tiled = None
        if packed.device.type == "cpu":
            tiled = _ops._convert_weight_to_int4pack_for_cpu(self._quantized(), 1)
        self.register_buffer("tiled", tiled, persistent=False)
        both = torch.stack([scales, torch.zeros_like(scales) if shifts is None else shifts], -1)
        pairs = both.transpose(0, 1).to(torch.bfloat16).contiguous()
        self.register_buffer("_scales_and_shifts", pairs, persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """`[..., out]` of `[..., in]`, in the dtype of inputs."""
        rows = inputs.reshape(-1, self.in_features)
        bias = None if self.bias is None else self.bias.to(inputs.dtype)
        if self.tiled is None or inputs.device.type != "cpu" or len(rows) > FEW_ROWS:
            return nn.functional.linear(inputs, self.unpacked(inputs.dtype), bias)
        result: Tensor = _ops._weight_int4pack_mm_for_cpu(
            rows.to(torch.bfloat16), self.tiled, self.group_size, self._scales_and_shifts
        )
        result = result.to(inputs.dtype)
        if bias is not None:
            result += bias
        return result.view(*inputs.shape[:-1], self.out_features)

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """The weights `[out, in]`, computed in float32 and rounded to `dtype`."""
        weights = (self._quantized() - _MIDDLE).float().view(self.out_features, -1, self.group_size)
        weights *= self.scales.float().unsqueeze(-1)  # type: ignore[operator]
        if self.shifts is not None:
            weights += self.shifts.float().unsqueeze(-1)  # type: ignore[operator]
        return weights.view(self.out_features, self.in_features).to(dtype)

    def unpack(self, dtype: torch.dtype) -> nn.Linear:
        """An ordinary layer of the same weights."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(self.unpacked(dtype), requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias, requires_grad=False)
        return linear

    def _quantized(self) -> Tensor:
        """int32 `[out, in]`, 0 to 15."""
        packed: Tensor = self.packed  # type: ignore[assignment]
        return torch.stack([packed & 15, packed >> 4], -1).flatten(1).to(torch.int32)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, group_size={self.group_size}"


def unpack_linears(model: nn.Module, dtype: torch.dtype) -> int:
    """Replace `model`'s packed layers by ordinary ones, for what must see weights; how many."""
    packed = [
        (parent, name, layer)
        for parent in model.modules()
        for name, layer in parent.named_children()
        if isinstance(layer, Int4Linear)
    ]
    for parent, name, layer in packed:
        setattr(parent, name, layer.unpack(dtype))
    return len(packed)


def settle_compressed(model: Any) -> tuple[int, int]:
    """Make a model that transformers loaded from a compressed-tensors checkpoint callable in parts.

    Linear layers of four bits whose activations are not quantized become `Int4Linear`; any other
    layer is decompressed by compressed-tensors to an ordinary one. A model of another kind is left
    alone. Returns how many of each.
    """
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if hasattr(child, "quantization_scheme")
    ]
    if not found:
        return 0, 0
    num_packed = 0
    for parent, name, child in found:
        if _stays_packed(child):
            setattr(parent, name, _packed(child))
            num_packed += 1
        else:
            _decompress(child)
    hook = getattr(model, "ct_decompress_hook", None)
    if hook is not None:
        hook.remove()
        del model.ct_decompress_hook
    return num_packed, len(found) - num_packed


def _stays_packed(layer: Any) -> bool:
    from compressed_tensors.quantization import QuantizationStrategy, QuantizationType

    scheme = layer.quantization_scheme
    packed = getattr(layer, "weight_packed", None)
    return (
        type(layer) is nn.Linear
        and isinstance(packed, Tensor)
        and scheme.weights.num_bits == _BITS
        and scheme.weights.type == QuantizationType.INT
        and scheme.weights.strategy in (QuantizationStrategy.GROUP, QuantizationStrategy.CHANNEL)
        and scheme.input_activations is None
        and scheme.output_activations is None
        # Columns whose groups are not neighbours (GPTQ's activation order).
        and getattr(layer, "weight_g_idx", None) is None
        and layer.out_features % ROW_MULTIPLE == 0
        and _group_size(layer) > 0
    )


def _group_size(layer: Any) -> int:
    """Columns that share a scale in `Int4Linear`; 0 where none of its sizes fits."""
    num_groups = layer.weight_scale.shape[1]
    own, rest = divmod(layer.in_features, num_groups)
    if rest:
        return 0
    return next((size for size in GROUP_SIZES if own % size == 0), 0)


def _packed(layer: Any) -> Int4Linear:
    packed = layer.weight_packed.data.contiguous().view(torch.uint8)[:, : layer.in_features // 2]
    scales = layer.weight_scale.data
    shifts = None
    if getattr(layer, "weight_zero_point", None) is not None:
        from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

        zeros = unpack_from_int32(layer.weight_zero_point.data, _BITS, scales.shape, packed_dim=0)
        shifts = -zeros.to(scales.dtype) * scales
    repeats = layer.in_features // scales.shape[1] // _group_size(layer)
    if repeats > 1:
        scales = scales.repeat_interleave(repeats, 1)
        shifts = None if shifts is None else shifts.repeat_interleave(repeats, 1)
    bias = None if layer.bias is None else layer.bias.data
    return Int4Linear(packed, scales, shifts, bias)


def _decompress(layer: Any) -> None:
    from compressed_tensors.compressors.base import decompress_module
    from compressed_tensors.quantization import QuantizationStatus

    if getattr(layer, "quantization_status", None) == QuantizationStatus.COMPRESSED:
        decompress_module(layer, leave_decompressed=False)
