"""Attention and feed-forward layers of one-token steps: what transformers gives, or left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flashhead_dist.decode.body import TransformersBody
from flashhead_dist.decode.cpu_attention import FusedAttention, fuse_attention
from flashhead_dist.decode.cpu_linear import StreamedLinear, stacked, stream_linears
from flashhead_dist.decode.cpu_mlp import FusedMlp, fuse_mlps
from flashhead_dist.decode.cpu_norm import fuse_norms
from flashhead_kernels.cpu_rotary import turn_heads
from flashhead_kernels.cpu_threads import compute_threads
from tests.integrations.transformers_models import PROMPT, make_model


def fuse(model: Any) -> tuple[int, int]:
    """How many attention and feed-forward layers were replaced."""
    stream_linears(model, model.get_decoder())
    fuse_norms(model)
    return fuse_attention(model), fuse_mlps(model)


def states(model: Any, prompts: Tensor, mask: Tensor | None, steps: int) -> Tensor:
    """Last hidden states of a prompt and of `steps` tokens after it, two of them taken back."""
    body = TransformersBody(model, recording=True)
    found = [body.prefill(prompts, mask)]
    body.rollback(0)
    for i in range(steps):
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        found.append(body.step(torch.full((len(prompts),), 7 * i + 3), mask))
        body.rollback(2 if i == 4 and mask is None else 0)
    return torch.stack(found)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("gemma3", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"num_key_value_heads": 4}),
        ("qwen2", {}),
        ("qwen3", {}),
    ],
)
def test_steps_are_as_plain_ones(kind: str, changes: dict[str, Any]) -> None:
    """30 steps pass a window of 16; the wrong half rotated, a head's keys mixed up or a forgotten
    bias fails. Prompts, batches and padding stay the plain layers'."""
    with torch.inference_mode(), compute_threads(2):
        model = make_model(kind, tied=False, **changes)
        for name, value in model.named_parameters():
            if name.endswith("bias"):
                value.normal_()
        one, mask = torch.tensor([PROMPT]), torch.tensor([[1] * 7, [0, 0] + [1] * 5])
        truth = states(model, one, None, 30), states(model, one.repeat(2, 1), mask, 3)
        assert fuse(model) == (2, 2)
        found = states(model, one, None, 30), states(model, one.repeat(2, 1), mask, 3)
    for expected, given in zip(truth, found, strict=True):
        torch.testing.assert_close(given, expected, rtol=2e-4, atol=2e-4)


def test_one_padded_sequence_is_the_plain_layers() -> None:
    with torch.inference_mode(), compute_threads(2):
        model = make_model("gemma3", tied=False)
        prompt, mask = torch.tensor([PROMPT]), torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
        truth = states(model, prompt, mask, 4)
        fuse(model)
        torch.testing.assert_close(states(model, prompt, mask, 4), truth, rtol=2e-4, atol=2e-4)


def test_capped_scores_are_left_alone() -> None:
    """Gemma-2 caps its scores: small ones agree with an attention that does not."""
    with torch.inference_mode(), compute_threads(2):
        model = make_model("gemma2", tied=False)
        for weight in model.parameters():
            weight.mul_(0.01)
        assert fuse(model) == (0, 2)


def test_one_layer_that_differs_keeps_its_class_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another rotation in one layer: a replacement by name and shape alone fails."""
    with torch.inference_mode(), compute_threads(2):
        model = make_model("llama", tied=False)
        layer = model.model.layers[1].self_attn
        plain = layer.forward

        def backwards(
            hidden_states: Tensor, position_embeddings: Any, attention_mask: Any,
            past_key_values: Any, **others: Any,
        ) -> Any:  # fmt: skip
            cos, sin = position_embeddings
            return plain(hidden_states, (cos, -sin), attention_mask, past_key_values, **others)

        monkeypatch.setattr(layer, "forward", backwards)
        assert fuse(model) == (0, 2)
    assert not any(isinstance(module, FusedAttention) for module in model.modules())


def test_a_feed_forward_that_gates_otherwise_is_left_alone() -> None:
    class Other(nn.Module):
        """The activation on the other factor."""

        def __init__(self) -> None:
            super().__init__()
            self.gate_proj, self.up_proj = nn.Linear(64, 96), nn.Linear(64, 96)
            self.down_proj, self.act_fn = nn.Linear(96, 64), nn.SiLU()

        def forward(self, states: Tensor) -> Tensor:
            result: Tensor = self.down_proj(
                self.gate_proj(states) * self.act_fn(self.up_proj(states))
            )
            return result

    torch.manual_seed(0)
    model = nn.ModuleList([Other()])
    with compute_threads(2):
        assert stream_linears(model, model) == 3
        assert fuse_mlps(model) == 0
    assert not isinstance(model[0], FusedMlp)


def test_bfloat16_layers_stay_plain() -> None:
    with compute_threads(2):
        model = make_model("llama", tied=False).bfloat16()
        assert fuse(model) == (0, 0)


def test_only_neighbours_are_stacked() -> None:
    with compute_threads(2):
        model = nn.Sequential(*(nn.Linear(64, 32) for _ in range(3)))
        stream_linears(model, model)
    layers: list[StreamedLinear] = list(model)  # type: ignore[arg-type]
    joined = stacked(layers[:2])
    assert joined is not None
    assert torch.equal(joined[0], torch.cat([layer.weight for layer in layers[:2]]))
    assert stacked([layers[0], layers[2]]) is None


@pytest.mark.parametrize("shape", [(1, 2), (3, 6), (4, 64), (0, 8)])
@pytest.mark.parametrize("normed", [True, False])
def test_turned_heads_are_the_truth(shape: tuple[int, int], normed: bool) -> None:
    """Pairs are half a head apart; neighbours as pairs fail."""
    torch.manual_seed(0)
    heads, scale, half = torch.randn(shape), torch.randn(shape[1]), shape[1] // 2
    cos, sin = torch.randn(shape[1]), torch.randn(shape[1])
    wide = heads.double()
    if normed:
        wide = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * scale.double()
    turned = torch.cat([-wide[:, half:], wide[:, :half]], dim=1)
    truth = wide * cos.double() + turned * sin.double()
    turn_heads(heads, cos, sin, scale if normed else None, 1e-6)
    torch.testing.assert_close(heads.double(), truth, rtol=1e-5, atol=1e-5)
