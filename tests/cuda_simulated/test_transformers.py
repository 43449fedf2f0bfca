"""A transformers model with a retrieval head writes the CPU's texts on a simulated GPU."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from flashhead_dist.index import IndexOptions, build_index
from flashhead_dist.integrations.transformers import replace_head
from flashhead_dist.models import open_model
from tests.cuda_simulated.conftest import HIDDEN_SIZE, OPTIONS, VOCAB_SIZE, Small

if TYPE_CHECKING:
    from simulated_cuda import SimulatedCuda

PROMPTS = torch.tensor([[5, 17, 44], [61, 2, 9]])
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "penalty": {"do_sample": False, "repetition_penalty": 1.3},
    "drawn": {"do_sample": True, "temperature": 6.0, "top_k": 20},
}


@pytest.fixture(scope="module")
def model_and_index(small: Small, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=HIDDEN_SIZE, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, attn_implementation="eager",
        bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.copy_(small.model.read_rows(0, VOCAB_SIZE))
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder / "model")
    index = build_index(
        open_model(str(folder / "model")), IndexOptions(**OPTIONS, alpha=0.02), calibration=None,
        test=None, out=folder / "index", device="cpu", progress=False,
    )  # fmt: skip
    return model, index


@pytest.mark.parametrize("way", WAYS)
def test_a_model_writes_the_cpus_text(
    cuda: SimulatedCuda, model_and_index: tuple[Any, Path], way: str
) -> None:
    dense, index = model_and_index
    texts = []
    for device in ("cpu", "cuda"):
        model = replace_head(copy.deepcopy(dense).to(device), index)
        torch.manual_seed(3)
        found = model.generate(PROMPTS.to(device), max_new_tokens=3, **WAYS[way])
        assert found.device.type == device
        texts.append(found.tolist())
    assert texts[0] == texts[1]
    assert {launch.device for launch in cuda.launches} <= {torch.device("cuda:0")}
