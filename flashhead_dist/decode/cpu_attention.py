"""Attention layers of a body that decodes one token at a time on a CPU, in a few calls each."""

from __future__ import annotations

import inspect
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from flashhead_dist.decode.cpu_linear import StreamedLinear, stacked
from flashhead_dist.decode.cpu_norm import FusedNorm
from flashhead_kernels.cpu_rotary import turn_heads

_PROBED_TOKENS = 4
_TOLERANCE = 1e-4
_ARGUMENTS = ("hidden_states", "position_embeddings", "attention_mask", "past_key_values")


class FusedAttention(nn.Module):
    """Grouped-query attention with rotated heads, for one float32 token without a mask.

    plain: the layer in whose place it stands, which still serves prompts, batches and padding, and
    whose projections are a crew's.
    """

    def __init__(self, plain: Any, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.plain = plain
        self._weight, self._bias = weight, bias
        self._out: StreamedLinear = plain.o_proj
        self._head_dim: int = plain.head_dim
        self._num_heads = plain.q_proj.out_features // self._head_dim
        self._num_groups = plain.k_proj.out_features // self._head_dim
        self._norms = [_scale(getattr(plain, name, None)) for name in ("q_norm", "k_norm")]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("plain"), name)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Any = None,
        past_key_values: Any = None,
        **others: Any,
    ) -> tuple[Tensor, Any]:
        """The layer's output `[B, L, D]`, and attention weights or None, as the plain layer's."""
        size = self._weight.shape[1]
        if (
            hidden_states.numel() != size
            or hidden_states.dtype is not torch.float32
            or attention_mask is not None
            or past_key_values is None
            or position_embeddings is None
            or others.get("output_attentions")
        ):
            result: tuple[Tensor, Any] = self.plain(
                hidden_states=hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                **others,
            )
            return result
        heads = self._out.crew.multiply(self._weight, hidden_states.contiguous(), self._out.weight)
        if self._bias is not None:
            heads += self._bias
        heads = heads.view(-1, self._head_dim)
        ends = (self._num_heads, self._num_heads + self._num_groups)
        query, keys, values = heads[: ends[0]], heads[ends[0] : ends[1]], heads[ends[1] :]
        cos, sin = position_embeddings
        for turned, (scale, eps) in zip((query, keys), self._norms, strict=True):
            turn_heads(turned, cos.contiguous(), sin.contiguous(), scale, eps)
        shape = (1, self._num_groups, 1, self._head_dim)
        all_keys, all_values = past_key_values.update(
            keys.view(shape), values.view(shape), self.plain.layer_idx
        )
        mixed = nn.functional.scaled_dot_product_attention(
            query.view(1, self._num_heads, 1, -1), all_keys, all_values,
            scale=self.plain.scaling, enable_gqa=self._num_heads > self._num_groups,
        )  # fmt: skip
        return self._out(mixed.view(*hidden_states.shape[:-1], -1)), None


def fuse_attention(model: nn.Module) -> int:
    """Have one-token steps of the attention layers of `model` computed in a few calls each.

    Only layers whose projections are a crew's and whose head norms, if any, are fused: call it
    after `stream_linears` and `fuse_norms`. An attention's name does not say what it does (caps,
    sinks, other rotations), so layers of a class are replaced only if each of them gives what its
    replacement does for some tokens at random positions. Returns how many layers.
    """
    found = [
        (parent, name, layer)
        for parent in model.modules()
        for name, layer in parent.named_children()
        if _is_candidate(layer)
    ]
    fused: dict[type, list[FusedAttention | None]] = defaultdict(list)
    for _, _, layer in found:
        fused[type(layer)].append(_fused(layer))
    count = 0
    for kind, layers in fused.items():
        if None in layers:
            continue
        places = [place for place in found if type(place[2]) is kind]
        for (parent, name, _), replacement in zip(places, layers, strict=True):
            setattr(parent, name, replacement)
            count += 1
    return count


def _is_candidate(layer: Any) -> bool:
    linears = [getattr(layer, name, None) for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
    norms = [getattr(layer, name, None) for name in ("q_norm", "k_norm")]
    return (
        not isinstance(layer, FusedAttention)
        and all(isinstance(linear, StreamedLinear) for linear in linears)
        and all(norm is None or isinstance(norm, FusedNorm) for norm in norms)
        and all(hasattr(layer, name) for name in ("head_dim", "layer_idx", "scaling"))
        and set(_ARGUMENTS) <= set(inspect.signature(layer.forward).parameters)
    )


def _fused(layer: Any) -> FusedAttention | None:
    joined = stacked([layer.q_proj, layer.k_proj, layer.v_proj])
    norms = [getattr(layer, name, None) for name in ("q_norm", "k_norm")]
    if (
        joined is None
        or joined[0].dtype is not torch.float32
        or any(norm is not None and norm.scale.numel() != layer.head_dim for norm in norms)
        or getattr(layer, "attn_logit_softcapping", None) is not None
    ):
        return None
    fused = FusedAttention(layer, *joined)
    return fused if _agree(layer, fused) else None


@torch.inference_mode()
def _agree(layer: Any, fused: FusedAttention) -> bool:
    """Whether both give the same for some tokens, each with a cache of its own."""
    generator = torch.Generator().manual_seed(0)
    caches = (DynamicCache(), DynamicCache())
    size = layer.q_proj.in_features
    for scale in torch.logspace(-1, 1, _PROBED_TOKENS):
        state = torch.randn(1, 1, size, generator=generator) * scale
        angles = torch.rand(1, 1, layer.head_dim // 2, generator=generator).repeat(1, 1, 2) * 6
        place = (angles.cos(), angles.sin())
        truth, found = (
            attention(**dict(zip(_ARGUMENTS, (state, place, None, cache), strict=True)))[0]
            for attention, cache in zip((layer, fused), caches, strict=True)
        )
        if not torch.allclose(found, truth, rtol=_TOLERANCE, atol=_TOLERANCE * float(truth.std())):
            return False
    return True


def _scale(norm: FusedNorm | None) -> tuple[Tensor | None, float]:
    return (None, 0.0) if norm is None else (norm.scale, norm.eps)
