"""Slices of a model, run one after the other in this process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from flashhead_dist.decode.body import record_past
from flashhead_dist.errors import UserError
from flashhead_dist.integrations.pipeline_stage import (
    MODEL_TYPES,
    PipelineStage,
    StageInput,
    layer_bounds,
)
from tests.integrations.small_models import small_model

WINDOW = 5
IDS = torch.randint(1, 97, (3, 9), generator=torch.Generator().manual_seed(1))
MASK = torch.tensor([[1] * 9, [0] * 4 + [1] * 5, [0] + [1] * 8])


def tiny(kind: str) -> Any:
    shape: dict[str, Any] = {"tie_word_embeddings": kind in ("gemma3_text", "qwen2")}
    if kind == "gemma3_text":
        layers = ["sliding_attention"] * 3 + ["full_attention", "sliding_attention"]
        shape |= {"sliding_window": WINDOW, "layer_types": layers}
    if kind in ("gemma2", "mistral"):
        shape["sliding_window"] = WINDOW
    return small_model(kind, seed=3, **shape)


def num_parameters(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_stages_hold_each_weight_once_and_give_the_whole_models_states(kind: str) -> None:
    """Fails if a stage's masks or caches are those of other layers: a window slides at each step.

    Also after a rollback past the point where the window had started to slide.
    """
    whole = tiny(kind)
    stages = [PipelineStage(lambda: tiny(kind), stage, 3) for stage in range(3)]
    assert [(stage.start, stage.stop) for stage in stages] == [(0, 2), (2, 4), (4, 5)]
    # The head's weights are held by the head, tied or not.
    assert sum(map(num_parameters, stages)) == num_parameters(whole.get_decoder())
    caches = [stage.new_cache(recording=True) for stage in stages]

    def run(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        for stage, cache in zip(stages, caches, strict=True):
            ids = stage(StageInput(ids, mask, cache))
        return ids[:, -1]

    def truth(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        decoder = whole.get_decoder()
        output = decoder(input_ids=ids, attention_mask=mask, position_ids=positions)
        return output.last_hidden_state[:, -1]

    with torch.inference_mode():
        torch.testing.assert_close(run(IDS, MASK), truth(IDS, MASK))
        for cache in caches:
            record_past(cache)
        ids, mask = IDS, MASK
        for step in range(9):
            ids = torch.cat([ids, torch.full((3, 1), 7 + step)], 1)
            mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.int64)], 1)
            states = run(ids[:, -1:], mask)
            torch.testing.assert_close(states, truth(ids, mask), rtol=1e-4, atol=1e-4)
            if step == 5:
                for cache in caches:
                    cache.crop(-4)
                ids, mask = ids[:, :-4], mask[:, :-4]


def test_layers_are_split_as_evenly_as_can_be_or_as_named() -> None:
    assert layer_bounds(18, 4) == [0, 5, 10, 14, 18]
    assert layer_bounds(18, 2, [11, 7]) == [0, 11, 18]


@pytest.mark.parametrize(
    ("pp_size", "layers", "sentence"),
    [
        (6, None, "pp_size 6 is more than the model's 5 layers: use 5 stages or fewer"),
        (2, [5, 0], r"layers per stage 5 \+ 0 do not give each of 2 stages a layer"),
        (2, [1, 2, 2], "do not give each of 2 stages a layer: name 2 numbers"),
        (2, [1, 3], r"layers per stage 1 \+ 3 are 4, but the model has 5 layers"),
    ],
)
def test_layers_that_cannot_be_split_are_refused(
    pp_size: int, layers: list[int] | None, sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        layer_bounds(5, pp_size, layers)


def test_a_model_of_another_kind_is_refused() -> None:
    config = transformers.GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=97)
    with pytest.raises(UserError, match="a gpt2 model cannot be split into pipeline stages"):
        PipelineStage(lambda: transformers.GPT2LMHeadModel(config), 0, 2)
