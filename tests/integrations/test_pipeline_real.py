"""Gemma-3-270M over pipeline stages: its texts are those of one rank, with either head."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flashhead_dist.decode.body import TransformersBody
from flashhead_dist.decode.loop import Choose, decode
from flashhead_dist.decode.sequences import DecodeState
from flashhead_dist.heads.base import Head
from flashhead_dist.heads.registry import HeadBuilder
from flashhead_dist.index import ensure_index
from flashhead_dist.models import open_model
from flashhead_dist.parallel import TensorParallel
from tests.integrations.small_models import greedy_text

pytestmark = [pytest.mark.real, pytest.mark.timeout(1800)]

NEW_TOKENS = 32
PROMPTS = [
    ["The capital of France is Paris. The capital of Germany is", "def fibonacci(n):\n"],
    ["Der schnelle braune Fuchs", "Natalia sold clips to 48 of her friends in April, and then"],
    ["La nuit tombait sur"],
]

Texts = list[list[list[int]]]


def texts(states: list[DecodeState]) -> Texts:
    return [[state.tokens(row) for row in range(state.batch_size)] for state in states]


def new_states(tokenizer: Any, check_every: int = 0) -> list[DecodeState]:
    return [
        DecodeState(
            [tokenizer(prompt).input_ids for prompt in prompts],
            max_new_tokens=NEW_TOKENS,
            check_every=check_every,
        )
        for prompts in PROMPTS
    ]


def greedy(head: Head) -> Choose:
    def choose(hidden: torch.Tensor, _: torch.Tensor, __: torch.Tensor) -> torch.Tensor:
        return head(hidden).token_ids[:, 0]

    return choose


def heads(tp: TensorParallel, index: Path) -> dict[str, Choose]:
    builder = HeadBuilder(tp=tp, model=open_model(), index_dir=index, dtype=torch.float32)
    return {name: greedy(builder.build(name)) for name in ("dense_local_max", "flashhead")}


def rank_texts(
    rank: int, world_size: int, layouts: list[tuple[int, int]], index: Path
) -> list[dict[str, Texts]]:
    from flashhead_dist.integrations.pipeline import PipelineDecoder

    found = []
    for pp_size, tp_size in layouts:
        tokenizer: Any = None

        def load() -> Any:
            nonlocal tokenizer
            model, tokenizer = open_model().load_body(torch.float32)
            return model

        pipeline = PipelineDecoder(load, pp_size=pp_size, tp_size=tp_size)
        choices = heads(pipeline.tp, index) if pipeline.is_last else {}
        dense, flashhead = choices.get("dense_local_max"), choices.get("flashhead")
        result = {}
        for name, choose, check_every in [
            ("dense_local_max", dense, 0),
            ("flashhead", flashhead, 0),
            ("lossless", flashhead, 16),
        ]:
            states = new_states(tokenizer, check_every)
            pipeline.decode(states, choose, confirm=dense)
            result[name] = texts(states)
        found.append(result)
    return found


def test_texts_of_every_layout_are_those_of_one_rank(run_ranks: Callable[..., list[Any]]) -> None:
    index = ensure_index(open_model())
    model, tokenizer = open_model().load_body(torch.float32)
    expected: Texts = []
    for prompts in PROMPTS:
        expected.append([])
        for prompt in prompts:
            expected[-1].append(greedy_text(model, tokenizer(prompt).input_ids, NEW_TOKENS))
    states = new_states(tokenizer)
    flashhead = heads(TensorParallel.single(), index)["flashhead"]
    for state in states:
        decode(TransformersBody(model), state, flashhead)
    for layouts in ([(2, 1)], [(4, 1), (2, 2)]):
        world_size = layouts[0][0] * layouts[0][1]
        for ranks in run_ranks(rank_texts, world_size, layouts, index, timeout_s=900):
            for result in ranks:
                assert result["dense_local_max"] == expected
                assert result["flashhead"] == texts(states)
                assert result["lossless"] == expected
