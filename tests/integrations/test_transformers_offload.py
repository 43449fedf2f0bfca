"""Models that accelerate keeps on a disk or in main memory, layer by layer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from flashhead_dist.integrations.transformers import replace_head, restore_head
from tests.integrations.transformers_models import PROMPT
from tests.integrations.transformers_zoo import Pair, Zoo

OPTIONS: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12}


def with_everything_on_disk(pair: Pair, folder: Path) -> Any:
    """As `from_pretrained` places a model that does not fit, embeddings included."""
    parts = {"model.embed_tokens": "disk", "lm_head": "disk", "model.layers.0": "cpu"}
    parts |= {"model.layers.1": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(
        pair.folder / "model", device_map=parts, offload_folder=folder, dtype=torch.float32
    )
    model.generation_config = copy.deepcopy(pair.dense.generation_config)
    assert model.model.layers[1].mlp.up_proj.weight.is_meta
    assert model.lm_head.weight.is_meta
    return model.eval()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["gemma3", "llama"])
def test_a_model_on_a_disk_takes_a_head(zoo: Zoo, kind: str, tied: bool, tmp_path: Path) -> None:
    pair = zoo.pair(kind, tied=tied)
    model = replace_head(with_everything_on_disk(pair, tmp_path), pair.index)
    assert model.model.layers[1].mlp.up_proj.weight.is_meta
    for more in ({}, {"repetition_penalty": 1.3}):
        wanted = pair.replaced().generate(torch.tensor([PROMPT]), **OPTIONS, **more)
        assert torch.equal(model.generate(torch.tensor([PROMPT]), **OPTIONS, **more), wanted)
    if tied:
        weight = model.get_input_embeddings().embedding.weight
        assert weight.data_ptr() == model.retrieval_head.logit_rows.head.shard.rows.data_ptr()
    restored = restore_head(model)
    wanted = pair.dense.generate(torch.tensor([PROMPT]), **OPTIONS)
    assert torch.equal(restored.generate(torch.tensor([PROMPT]), **OPTIONS), wanted)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_a_replaced_model_can_be_offloaded(
    zoo: Zoo, where: str, tied: bool, tmp_path: Path
) -> None:
    pair = zoo.pair("gemma3", tied=tied)
    model, device = pair.replaced(), torch.device("cpu")
    wanted = model.generate(torch.tensor([PROMPT]), **OPTIONS)
    if where == "cpu":
        cpu_offload(model, execution_device=device)
    else:
        disk_offload(model, tmp_path, execution_device=device)
    assert model.model.layers[1].mlp.up_proj.weight.is_meta
    assert torch.equal(model.generate(torch.tensor([PROMPT]), **OPTIONS), wanted)
