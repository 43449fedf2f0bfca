"""Linear layers of a body that decodes one token at a time on a CPU.

For one row torch hands a float32 linear layer to MKL, which uses one thread for it whatever
`torch.get_num_threads()` says, and 16-bit layers to oneDNN, at a fraction of the memory's rate.
Here the weights are streamed as the heads' rows are, by `flashhead_kernels.crew`. Every head
decodes over the same body.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flashhead_kernels.cpu_memory import empty_on_large_pages
from flashhead_kernels.crew import Crew

_BLOCK_BYTES = 1 << 25
_ALIGNMENT = 32
"""Values that a layer's weights begin at a multiple of: at least a cache line."""
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_Place = tuple[nn.Module, str, nn.Linear]


class StreamedLinear(nn.Module):
    """An `nn.Linear` on a CPU: one row by a crew's threads, several by torch.

    weight: `[out_features, in_features]`, the layer's own values. A row is summed in float32 and
    rounded once to the layer's dtype. following: the layer that is likely to be called next.
    """

    def __init__(self, linear: nn.Linear, weight: Tensor, crew: Crew) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.crew = crew
        self._following: Tensor | None = None

    def precede(self, layer: StreamedLinear) -> None:
        """Read `layer`'s weights into the cache once this one is done: it comes next."""
        self._following = layer.weight.data

    def forward(self, inputs: Tensor) -> Tensor:
        """`[..., out_features]` of `[..., in_features]`, in the layer's dtype."""
        if inputs.numel() != self.in_features or inputs.dtype is not self.weight.dtype:
            return nn.functional.linear(inputs, self.weight, self.bias)
        state = inputs.float().contiguous()
        result = self.crew.multiply(self.weight, state, self._following)
        if self.bias is not None:
            result += self.bias
        return result.to(inputs.dtype).view(*inputs.shape[:-1], self.out_features)


def stacked(layers: Sequence[StreamedLinear]) -> tuple[Tensor, Tensor | None] | None:
    """The weights of neighbours as one `[sum of out_features, in_features]`, and their biases.

    None where the layers differ in width or dtype, or do not lie side by side.
    """
    first = layers[0]
    end = first.weight.data_ptr()
    for layer in layers:
        if (
            layer.weight.data_ptr() != end
            or layer.in_features != first.in_features
            or layer.weight.dtype is not first.weight.dtype
            or (layer.bias is None) != (first.bias is None)
        ):
            return None
        end += layer.weight.nbytes
    rows = sum(layer.out_features for layer in layers)
    weight = first.weight.detach().as_strided((rows, first.in_features), (first.in_features, 1))
    return weight, None if first.bias is None else torch.cat([layer.bias for layer in layers])


def stream_linears(model: nn.Module, decoder: nn.Module) -> int:
    """Have the `nn.Linear` layers of `model` that are on a CPU computed by a crew of threads.

    Their weights move to large pages, some megabytes at a time. In a step of one token torch itself
    uses one thread, since OpenMP's would spin against the crew's; the crew is awake for such a step
    of `decoder` and for nothing else. Returns how many layers: none with a single thread.
    """
    threads = torch.get_num_threads()
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear
        and child.weight.device.type == "cpu"
        and child.weight.dtype in _DTYPES
        and child.weight.numel()
    ]
    if threads == 1 or not found:
        return 0
    crew = Crew(threads)
    layers = [layer for places in _blocks(found) for layer in _move(places, crew)]
    for layer, following in zip(layers, layers[1:] + layers[:1], strict=True):
        layer.precede(following)
    shift = _Shift(crew)
    decoder.register_forward_pre_hook(shift.begin, with_kwargs=True)
    decoder.register_forward_hook(shift.end, with_kwargs=True, always_call=True)
    return len(layers)


class _Shift:
    """Wakes the crew for a decoder's step of one token, and dismisses it after."""

    def __init__(self, crew: Crew) -> None:
        self._crew = crew
        self._threads = 0

    def begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = args[0] if args else kwargs.get("input_ids")
        if inputs is not None and inputs.numel() == 1:
            self._threads = torch.get_num_threads()
            torch.set_num_threads(1)
            self._crew.wake()

    def end(self, *_: Any) -> None:
        if self._threads:
            self._crew.dismiss()
            torch.set_num_threads(self._threads)
            self._threads = 0


def _move(places: list[_Place], crew: Crew) -> list[StreamedLinear]:
    """Replace some layers by others, whose weights lie in one block."""
    dtype = places[0][2].weight.dtype
    block = empty_on_large_pages((sum(_room(layer) for _, _, layer in places),), dtype)
    start, layers = 0, []
    for parent, name, layer in places:
        weight = block[start : start + layer.weight.numel()].view(layer.weight.shape)
        weight.copy_(layer.weight.detach())
        layers.append(StreamedLinear(layer, weight, crew))
        setattr(parent, name, layers[-1])
        start += _room(layer)
    return layers


def _blocks(places: list[_Place]) -> Iterator[list[_Place]]:
    """Neighbours of one dtype, some megabytes together; layers of one parent are not parted."""
    block: list[_Place] = []
    for place in places:
        full = sum(layer.weight.nbytes for _, _, layer in block) >= _BLOCK_BYTES
        if block and (
            block[0][2].weight.dtype != place[2].weight.dtype
            or (full and block[-1][0] is not place[0])
        ):
            yield block
            block = []
        block.append(place)
    if block:
        yield block


def _room(layer: nn.Linear) -> int:
    return -(-layer.weight.numel() // _ALIGNMENT) * _ALIGNMENT
