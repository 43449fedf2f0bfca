"""Steps of one token on a CPU in few calls, for bodies whose layers are known to be these.

The table `_FAMILIES` lists the transformers classes that are served: Llama, Qwen2, Qwen3 and
Gemma-3, each tested against transformers token for token. Every other model, a prompt, a batch and
a padded sequence use transformers' own layers. `speed_up_body` gives the layers of a served body
another `forward`; modules and their weights stay where they are.

For one row torch hands a float32 linear layer to MKL, which uses one thread for it whatever
`torch.get_num_threads()` says, and 16-bit layers to oneDNN, at a fraction of the memory's rate.
Here the weights are streamed as the heads' rows are, by `flashhead_kernels.cpu_body`. In float32 a
norm, a head norm with its rotation, and layers that read the same state are one call each as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.gemma3 import modeling_gemma3 as gemma3
from transformers.models.llama import modeling_llama as llama
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.models.qwen3 import modeling_qwen3 as qwen3

from flashhead_kernels.cpu_body import MatVecPool, rms_norm, turn_heads
from flashhead_kernels.cpu_threads import empty_on_large_pages

_FAMILIES: dict[type, tuple[type, type, type]] = {
    llama.LlamaModel: (llama.LlamaRMSNorm, llama.LlamaAttention, llama.LlamaMLP),
    qwen2.Qwen2Model: (qwen2.Qwen2RMSNorm, qwen2.Qwen2Attention, qwen2.Qwen2MLP),
    qwen3.Qwen3Model: (qwen3.Qwen3RMSNorm, qwen3.Qwen3Attention, qwen3.Qwen3MLP),
    gemma3.Gemma3TextModel: (gemma3.Gemma3RMSNorm, gemma3.Gemma3Attention, gemma3.Gemma3MLP),
}
"""Norm, attention and feed-forward class of each decoder class."""

_FEW_VALUES = 1 << 16
"""A norm of more goes to the layer itself, which has all threads at work."""
_BLOCK_BYTES = 1 << 25
_ALIGNMENT = 32
"""Values that a layer's weights begin at a multiple of: at least a cache line."""
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def speed_up_body(model: Any) -> bool:
    """Compute one-token steps of a transformers causal LM's body on a CPU in few calls.

    Linear layers move to large pages, some megabytes at a time, and use torch's current number of
    threads; with one thread they stay as they are. Layers that another library has replaced
    (sharded or packed ones) stay too. Returns whether the model's family is served.
    """
    decoder = model.get_decoder()
    if type(decoder) not in _FAMILIES or next(decoder.parameters()).device.type != "cpu":
        return False
    norm_class, attention_class, mlp_class = _FAMILIES[type(decoder)]
    _stream_linears(decoder)
    layers: list[Any] = list(decoder.modules())
    for layer in layers:
        kind = type(layer)
        if kind is norm_class and layer.weight.dtype is torch.float32:
            layer.forward = FusedNorm(layer, plus_one=norm_class is gemma3.Gemma3RMSNorm)
    for layer in layers:
        kind = type(layer)
        if kind is attention_class and _can_fuse(layer, ("q_proj", "k_proj", "v_proj")):
            layer.forward = FusedAttention(layer)
        elif kind is mlp_class and _can_fuse(layer, ("gate_proj", "up_proj")):
            layer.forward = FusedMlp(layer)
    return True


class StreamedLinear:
    """The forward pass of an `nn.Linear`: one row by a pool of threads, several by torch.

    A row is summed in float32 and rounded once to the layer's dtype. `following` are the weights to
    read into the cache once this product is done: the next layer's.
    """

    def __init__(self, linear: nn.Linear, pool: MatVecPool) -> None:
        self.weight, self.bias = linear.weight, linear.bias
        self.out_features, self.in_features = linear.out_features, linear.in_features
        self.pool = pool
        self.following: Tensor | None = None

    def __call__(self, inputs: Tensor) -> Tensor:
        """`[..., out_features]` of `[..., in_features]`, in the layer's dtype."""
        if inputs.numel() != self.in_features or inputs.dtype is not self.weight.dtype:
            return nn.functional.linear(inputs, self.weight, self.bias)
        result = self.pool.multiply(self.weight, inputs.float().contiguous(), self.following)
        if self.bias is not None:
            result += self.bias
        return result.to(inputs.dtype).view(*inputs.shape[:-1], self.out_features)


class FusedNorm:
    """The forward pass of a float32 RMSNorm that scales by its weight, or by one more than it."""

    def __init__(self, norm: Any, *, plus_one: bool) -> None:
        self.plain = norm.forward
        self.scale = norm.weight.detach() + 1 if plus_one else norm.weight.detach().clone()
        self.eps = float(norm.eps if plus_one else norm.variance_epsilon)

    def __call__(self, hidden_states: Tensor) -> Tensor:
        """`[..., D]` of `[..., D]`."""
        if hidden_states.numel() > _FEW_VALUES or hidden_states.dtype is not torch.float32:
            result: Tensor = self.plain(hidden_states)
            return result
        return rms_norm(hidden_states, self.scale, self.eps)


class FusedMlp:
    """The forward pass of `down(act(gate(x)) * up(x))`, gate and up as one product.

    (Shazeer, "GLU Variants Improve Transformer", 2020.)
    """

    def __init__(self, mlp: Any) -> None:
        self.plain = mlp.forward
        self.weight, self.bias = _joined(mlp.gate_proj, mlp.up_proj)
        self.activation, self.down = mlp.act_fn, mlp.down_proj.forward

    def __call__(self, x: Tensor) -> Tensor:
        """`[..., D]` of `[..., D]`."""
        if x.numel() != self.weight.shape[1] or x.dtype is not torch.float32:
            result: Tensor = self.plain(x)
            return result
        both = self.down.pool.multiply(self.weight, x.contiguous(), self.down.weight)
        if self.bias is not None:
            both += self.bias
        gate, up = both.view(2, 1, -1)
        product: Tensor = self.down(self.activation(gate).mul_(up))
        return product.view(x.shape)


class FusedAttention:
    """The forward pass of grouped-query attention, for one float32 token without a mask."""

    def __init__(self, attention: Any) -> None:
        self.plain, self.layer_idx = attention.forward, attention.layer_idx
        self.weight, self.bias = _joined(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out = attention.o_proj.forward
        self.head_dim, self.scaling = attention.head_dim, attention.scaling
        self.num_heads = attention.q_proj.out_features // self.head_dim
        self.num_groups = attention.k_proj.out_features // self.head_dim
        norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        self.norms = [(None, 0.0) if n is None else (n.forward.scale, n.forward.eps) for n in norms]

    def __call__(
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Any = None,
        past_key_values: Any = None,
        **others: Any,
    ) -> tuple[Tensor, Any]:
        """The layer's output `[B, L, D]`, and attention weights or None, as the layer's own."""
        if (
            hidden_states.numel() != self.weight.shape[1]
            or hidden_states.dtype is not torch.float32
            or attention_mask is not None
            or past_key_values is None
            or position_embeddings is None
            or position_embeddings[0].shape[-1] != self.head_dim
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
        heads = self.out.pool.multiply(self.weight, hidden_states.contiguous(), self.out.weight)
        if self.bias is not None:
            heads += self.bias
        sizes = [self.num_heads, self.num_groups, self.num_groups]
        query, keys, values = torch.split(heads.view(-1, self.head_dim), sizes)
        cos, sin = position_embeddings
        for turned, (scale, eps) in zip((query, keys), self.norms, strict=True):
            turn_heads(turned, cos.contiguous(), sin.contiguous(), scale, eps)
        shape = (1, self.num_groups, 1, self.head_dim)
        all_keys, all_values = past_key_values.update(
            keys.view(shape), values.view(shape), self.layer_idx
        )
        mixed = nn.functional.scaled_dot_product_attention(
            query.view(1, self.num_heads, 1, -1), all_keys, all_values,
            scale=self.scaling, enable_gqa=self.num_heads > self.num_groups,
        )  # fmt: skip
        return self.out(mixed.view(*hidden_states.shape[:-1], -1)), None


def _can_fuse(layer: Any, names: tuple[str, ...]) -> bool:
    """Whether a layer's projections are streamed float32, those of `names` side by side in memory.

    Gemma-3's attention may cap its scores, which is left to the layer.
    """
    out = "o_proj" if "q_proj" in names else "down_proj"
    linears = [getattr(layer, name) for name in (*names, out)]
    if (
        not all(isinstance(linear.forward, StreamedLinear) for linear in linears)
        or any(linear.weight.dtype is not torch.float32 for linear in linears)
        or getattr(layer, "attn_logit_softcapping", None) is not None
    ):
        return False
    return all(
        left.weight.data_ptr() + left.weight.nbytes == right.weight.data_ptr()
        for left, right in pairwise(linears[:-1])
    )


def _joined(*linears: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """Weights of neighbours as one `[sum of out_features, in_features]`, and their biases."""
    first = linears[0]
    rows = sum(linear.out_features for linear in linears)
    weight = first.weight.detach().as_strided((rows, first.in_features), (first.in_features, 1))
    biases: list[Tensor] = [linear.bias for linear in linears if linear.bias is not None]
    return weight, torch.cat(biases) if biases else None


def _stream_linears(decoder: nn.Module) -> None:
    """Have `decoder`'s linear layers computed by a pool of threads.

    In a step of one token torch itself uses one thread, since OpenMP's would spin against the
    pool's; the pool is awake for such a step and for nothing else.
    """
    found: list[Any] = [
        layer
        for parent in decoder.modules()
        for layer in parent.children()
        if type(layer) is nn.Linear and layer.weight.dtype in _DTYPES and layer.weight.numel()
    ]
    threads = torch.get_num_threads()
    if threads == 1 or not found:
        return
    pool = MatVecPool(threads)
    for block in _blocks(found):
        _move(block)
    streamed = [StreamedLinear(linear, pool) for linear in found]
    for linear, forward, following in zip(
        found, streamed, streamed[1:] + streamed[:1], strict=True
    ):
        forward.following = following.weight
        linear.forward = forward
    step = _OneTokenStep(pool)
    decoder.register_forward_pre_hook(step.begin, with_kwargs=True)
    decoder.register_forward_hook(step.end, with_kwargs=True, always_call=True)


class _OneTokenStep:
    """Wakes the pool for a decoder's step of one token, and lets it sleep after."""

    def __init__(self, pool: MatVecPool) -> None:
        self._pool = pool
        self._threads = 0

    def begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = args[0] if args else kwargs.get("input_ids")
        if inputs is not None and inputs.numel() == 1:
            self._threads = torch.get_num_threads()
            torch.set_num_threads(1)
            self._pool.wake()

    def end(self, *_: Any) -> None:
        if self._threads:
            self._pool.dismiss()
            torch.set_num_threads(self._threads)
            self._threads = 0


def _blocks(linears: Sequence[nn.Linear]) -> Iterator[list[nn.Linear]]:
    """Neighbours of one dtype, some megabytes together; equal inputs are not separated."""
    block: list[nn.Linear] = []
    for linear in linears:
        full = sum(other.weight.nbytes for other in block) >= _BLOCK_BYTES
        if block and (
            block[0].weight.dtype != linear.weight.dtype
            or (full and block[-1].in_features != linear.in_features)
        ):
            yield block
            block = []
        block.append(linear)
    if block:
        yield block


def _move(linears: Sequence[nn.Linear]) -> None:
    """Give some layers' weights one block on large pages."""
    sizes = [-(-linear.weight.numel() // _ALIGNMENT) * _ALIGNMENT for linear in linears]
    block = empty_on_large_pages((sum(sizes),), linears[0].weight.dtype)
    for linear, part in zip(linears, torch.split(block, sizes), strict=True):
        weight = part[: linear.weight.numel()].view(linear.weight.shape)
        weight.copy_(linear.weight.detach())
        linear.weight = nn.Parameter(weight, requires_grad=False)
