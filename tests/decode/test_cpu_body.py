"""Steps of one token on a CPU: transformers' tokens for the listed families, others unchanged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PhiConfig

from flashhead_dist.decode.body import TransformersBody
from flashhead_dist.decode.cpu_body import FusedAttention, FusedMlp, FusedNorm, StreamedLinear
from flashhead_dist.decode.cpu_body import speed_up_body as speed_up
from flashhead_kernels.cpu_body import MatVecPool, rms_norm, turn_heads
from flashhead_kernels.cpu_threads import compute_threads
from tests.integrations.transformers_models import PROMPT, make_model

# A row's products in float32 (bfloat16's and float16's are exact there), rounded once.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
KINDS = ("gemma3", "llama", "qwen2", "qwen3")


def fused(model: Any) -> dict[str, int]:
    """How many layers of each kind have another forward pass."""
    kinds = (FusedNorm, FusedAttention, FusedMlp, StreamedLinear)
    forwards = [module.__dict__.get("forward") for module in model.modules()]
    return {
        kind.__name__: count
        for kind in kinds
        if (count := sum(isinstance(forward, kind) for forward in forwards))
    }


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


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_transformers(kind: str, groups: int, tied: bool) -> None:
    """30 tokens pass Gemma's window of 16; a wrong half rotated or keys mixed up fails."""
    with torch.inference_mode(), compute_threads(2):
        model = make_model(kind, tied=tied, num_key_value_heads=groups)
        options: dict[str, Any] = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None}
        truth = model.generate(torch.tensor([PROMPT]), **options)
        assert speed_up(model)
        counts = fused(model)
        assert (counts["FusedAttention"], counts["FusedMlp"]) == (2, 2)
        assert torch.equal(model.generate(torch.tensor([PROMPT]), **options), truth)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [(kind, {}) for kind in KINDS] + [("llama", {"attention_bias": True, "mlp_bias": True})],
)
def test_states_are_those_of_transformers(kind: str, changes: dict[str, Any]) -> None:
    """Biases included; prompts, batches and padded sequences stay the plain layers'."""
    with torch.inference_mode(), compute_threads(2):
        model = make_model(kind, tied=False, **changes)
        for name, value in model.named_parameters():
            if name.endswith("bias"):
                value.normal_()
        one, padded = torch.tensor([PROMPT]), torch.tensor([[1] * 7, [0, 0] + [1] * 5])
        cases = [(one, None, 30), (one.repeat(2, 1), padded, 3), (one, padded[1:], 4)]
        truth = [states(model, *case) for case in cases]
        assert speed_up(model)
        for case, expected in zip(cases, truth, strict=True):
            torch.testing.assert_close(states(model, *case), expected, rtol=2e-4, atol=2e-4)


def test_other_families_keep_their_own_layers() -> None:
    sizes = {"vocab_size": 50, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    phi = AutoModelForCausalLM.from_config(PhiConfig(**sizes, num_attention_heads=4))
    with compute_threads(2):
        for model in (make_model("gemma2", tied=False), phi):
            assert not speed_up(model)
            assert fused(model) == {}


def test_what_is_left_to_the_layers_of_a_served_family() -> None:
    with compute_threads(2):
        capped = make_model("gemma3", tied=False, attn_logit_softcapping=5.0)
        speed_up(capped)
        assert "FusedAttention" not in fused(capped)
        half = make_model("llama", tied=False).bfloat16()
        speed_up(half)
        assert fused(half) == {"StreamedLinear": 14}
    with compute_threads(1):
        single = make_model("llama", tied=False)
        speed_up(single)
        assert fused(single) == {"FusedNorm": 5}


def test_weights_keep_their_values_and_other_layers_their_class() -> None:
    class Sharded(nn.Linear):
        """What another library makes of a linear layer."""

    with compute_threads(2):
        model = make_model("llama", tied=False)
        mlp = model.model.layers[0].mlp
        mlp.up_proj = Sharded(64, 96, bias=False)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        speed_up(model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert fused(model) | {"FusedNorm": 0} == {
        "FusedNorm": 0, "FusedAttention": 2, "FusedMlp": 1, "StreamedLinear": 13,
    }  # fmt: skip


def test_pool_is_awake_for_a_step_of_one_token_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch has its threads back after the step, and after one that failed."""
    with torch.inference_mode(), compute_threads(2):
        model = make_model("llama", tied=False)
        speed_up(model)
        threads: list[int] = []

        def note(*_: Any) -> None:
            threads.append(torch.get_num_threads())
            if len(threads) == 4:
                raise ValueError("a step that fails")

        model.model.norm.register_forward_pre_hook(note)
        model.model(input_ids=torch.tensor([[1, 2, 3]]))
        model.model(input_ids=torch.tensor([[1]]))
        model.model(torch.tensor([[1]]))
        assert torch.get_num_threads() == 2
        with pytest.raises(ValueError, match="fails"):
            model.model(input_ids=torch.tensor([[1]]))
        assert torch.get_num_threads() == 2
    assert threads == [2, 1, 1, 1]


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("shape", [(1, 1, 70), (1, 7, 70), (3, 1, 70), (0, 1, 70), (70,)])
@pytest.mark.parametrize("bias", [True, False])
def test_streamed_product_is_linear(shape: tuple[int, ...], bias: bool, dtype: torch.dtype) -> None:
    """70 columns leave six over after the steps of 64; a product that forgot them fails."""
    torch.manual_seed(0)
    linear = nn.Linear(70, 33, bias=bias, dtype=dtype)
    inputs = torch.randn(*shape[:-1], 140).to(dtype)[..., ::2]
    with torch.inference_mode():
        truth = nn.functional.linear(
            inputs.double(), linear.weight.double(), linear.bias.double() if bias else None
        )
        found = StreamedLinear(linear, MatVecPool(2))(inputs)
    assert found.dtype is dtype
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(found.double(), truth, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("shape", [(1, 1, 70), (2, 4, 640), (1, 7), (0, 64), (3, 0)])
def test_rms_norm_is_the_truth(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    values, weight = torch.randn(shape), torch.randn(shape[-1])
    wide = values.double()
    truth = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    torch.testing.assert_close(rms_norm(values, weight, 1e-6).double(), truth, rtol=1e-6, atol=1e-6)


def test_rms_norm_of_zeros_infinity_nan_and_strides() -> None:
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
