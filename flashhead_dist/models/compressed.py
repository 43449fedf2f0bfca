"""Checkpoints that compressed-tensors wrote: four-bit layers stay packed, others become dense.

transformers loads such a checkpoint with a hook that makes every layer dense at the first call of
the whole model, and a decoder that is called by itself has no weights at all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flashhead_dist.models.int4_linear import GROUP_SIZES, ROW_MULTIPLE, Int4Linear

_BITS = 4


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
        elif _is_compressed(child):
            _decompress(child)
    hook = getattr(model, "ct_decompress_hook", None)
    if hook is not None:
        hook.remove()
        del model.ct_decompress_hook
    return num_packed, len(found) - num_packed


def _is_compressed(layer: Any) -> bool:
    from compressed_tensors.quantization import QuantizationStatus

    status = getattr(layer, "quantization_status", None)
    return status is not None and status == QuantizationStatus.COMPRESSED


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


def _decompress(layer: nn.Module) -> None:
    from compressed_tensors.compressors.base import decompress_module

    decompress_module(layer, leave_decompressed=False)
