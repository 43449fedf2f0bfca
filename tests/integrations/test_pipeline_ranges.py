"""The ranges of two pipeline stages: bodies, and every message with its bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor

from flashhead_dist.decode.sequences import DecodeState
from flashhead_dist.integrations.pipeline import PipelineDecoder
from flashhead_profiles.ranges import recording

HIDDEN, TOKENS = 32, 5
PROMPTS = [[5, 6, 7, 8], [12, 13, 14, 15]]


def tiny() -> Any:
    torch.manual_seed(6)
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    return transformers.LlamaForCausalLM(config).eval()


def recorded(rank: int, world_size: int) -> dict[tuple[str, int | None], int]:
    """How often each range with each payload."""
    pipeline = PipelineDecoder(tiny, pp_size=world_size)
    head = tiny().lm_head

    def choose(hidden: Tensor, positions: Tensor, sequences: Tensor) -> Tensor:
        chosen: Tensor = head(hidden).argmax(-1)
        return chosen

    states = [DecodeState([prompt], max_new_tokens=TOKENS) for prompt in PROMPTS]
    with recording() as recorder:
        pipeline.decode(states, choose)
        spans = recorder.take()
    depths = {span.name: span.depth for span in spans}
    assert depths["step"] == 0
    assert depths["body"] == 1
    return dict(Counter((span.name, span.payload) for span in spans))


def test_each_stage_steps_runs_its_layers_and_names_its_messages(
    run_ranks: Callable[..., list[Any]],
) -> None:
    """Bytes of a prompt's four rows of hidden states, then of one row; a token id is eight."""
    first, last = run_ranks(recorded, 2)
    row_bytes, turns = HIDDEN * 4, TOKENS * len(PROMPTS)
    prompts, later = len(PROMPTS), turns - len(PROMPTS)
    assert first["pipeline/send", 4 * row_bytes] == prompts
    assert first["pipeline/send", row_bytes] == later
    assert first["pipeline/recv", 8] == turns
    assert last["pipeline/recv", 4 * row_bytes] == prompts
    assert last["pipeline/recv", row_bytes] == later
    assert last["pipeline/send", 8] == turns
    for stage in (first, last):
        assert (stage["body", 4], stage["body", 1]) == (prompts, later)
        assert sum(count for (name, _), count in stage.items() if name == "step") == turns
