"""A text decoded on a simulated GPU, with each token checked by the dense head."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from flashhead_dist.decode.body import TransformersBody
from flashhead_dist.decode.loop import decode
from flashhead_dist.decode.sequences import DecodeState
from flashhead_dist.heads.sampling import SamplingParameters, choose_tokens
from tests.cuda_simulated.conftest import HIDDEN_SIZE, VOCAB_SIZE, Small

if TYPE_CHECKING:
    from simulated_cuda import SimulatedCuda

PROMPTS = [[5, 17, 44], [61, 2]]
NEW_TOKENS = 7


@pytest.fixture(scope="module")
def llama() -> Any:
    """Two small layers below the heads, which attend without a fused kernel."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=HIDDEN_SIZE, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, attn_implementation="eager",
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for weight in model.model.parameters():
            if weight.ndim == 2:
                weight.mul_(12)
    return model


@pytest.mark.parametrize("parameters", [SamplingParameters(), SamplingParameters(temperature=9.0)])
def test_checked_text_is_the_dense_heads(
    cuda: SimulatedCuda, small: Small, llama: Any, parameters: SamplingParameters
) -> None:
    texts = {}
    for device in ("cpu", "cuda"):
        llama.to(device)
        dense, flashhead = (small.head(name, device) for name in ("dense_local_max", "flashhead"))
        for name, head, check_every in (("dense", dense, 0), ("checked", flashhead, 3)):
            body = TransformersBody(llama, recording=check_every > 0)
            state = DecodeState(PROMPTS, max_new_tokens=NEW_TOKENS, check_every=check_every)
            decode(
                body,
                state,
                lambda *given, head=head: choose_tokens(head, *given, parameters),
                confirm=lambda *given, dense=dense: choose_tokens(dense, *given, parameters),
            )
            texts[device, name] = [state.tokens(row) for row in range(len(PROMPTS))]
    assert len({token for text in texts["cpu", "dense"] for token in text}) > NEW_TOKENS // 2
    assert all(text == texts["cpu", "dense"] for text in texts.values())
