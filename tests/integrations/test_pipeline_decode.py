"""Real pipelines of gloo processes against the unsharded model, token for token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flashhead_dist.decode.body import TransformersBody
from flashhead_dist.decode.loop import Choose, decode
from flashhead_dist.decode.sequences import DecodeState
from flashhead_dist.heads.base import VocabShard
from flashhead_dist.heads.dense import DenseLocalMax
from flashhead_dist.heads.sampling import SamplingParameters, choose_tokens
from flashhead_dist.parallel import TensorParallel
from tests.integrations.small_models import greedy_text, small_model

VOCAB = 97
NEW_TOKENS = 14
PROMPTS = [
    [[5, 6, 7, 8, 9, 10, 11], [12, 13], [3, 1, 4, 1]],  # padded
    [[9, 2]],
    [[20, 21, 22, 23, 24, 25, 26, 27, 28], [30, 31, 32, 33, 34, 35, 36, 37, 38]],
]
"""Prompts of three micro-batches; Gemma's window, below, slides past all of them."""
STOPS = frozenset(range(0, VOCAB, 9))

Layout = tuple[str, int, int, tuple[int, ...] | None]
"""Kind of model, pp_size, tp_size, layers per stage."""
TWO_RANKS: list[Layout] = [("llama", 2, 1, None), ("gemma3", 2, 1, None)]
FOUR_RANKS: list[Layout] = [("gemma3", 4, 1, (1, 2, 1, 1)), ("llama", 2, 2, None)]


def tiny(kind: str) -> Any:
    if kind == "llama":
        return small_model(initializer_range=0.4)
    # One stage of pp 2, and two of pp 4, have sliding layers only.
    layers = ["sliding_attention"] * 3 + ["full_attention", "sliding_attention"]
    return small_model("gemma3_text", initializer_range=0.4, sliding_window=6, layer_types=layers)


def references(kind: str) -> list[list[list[int]]]:
    model = tiny(kind)
    return [[greedy_text(model, prompt, NEW_TOKENS) for prompt in prompts] for prompts in PROMPTS]


def choice(model: Any, tp: TensorParallel, temperature: float) -> Choose:
    """The dense head, its vocabulary sharded over the last stage's group; greedy or sampling."""
    shard = VocabShard.of(VOCAB, tp)
    head = DenseLocalMax(tp, model.lm_head.weight.detach()[shard.start : shard.stop], VOCAB)
    parameters = SamplingParameters(temperature=temperature, seed=11)

    def choose(hidden: Tensor, positions: Tensor, sequences: Tensor) -> Tensor:
        return choose_tokens(head, hidden, positions, sequences, parameters)

    return choose


def often_wrong(choose: Choose) -> Choose:
    """Another token at every seventh place: what a bad retrieval head would do."""

    def wrong(hidden: Tensor, positions: Tensor, sequences: Tensor) -> Tensor:
        chosen = choose(hidden, positions, sequences)
        return torch.where((positions + 2 * sequences) % 7 == 0, (chosen + 1) % VOCAB, chosen)

    return wrong


def unsharded_draws(kind: str) -> list[list[list[int]]]:
    """What one rank samples, one micro-batch after the other."""
    model = tiny(kind)
    decoded = states()
    for state in decoded:
        decode(TransformersBody(model), state, choice(model, TensorParallel.single(), 1.0))
    return tokens(decoded)


def states(**options: Any) -> list[DecodeState]:
    first = [sum(map(len, PROMPTS[:i])) for i in range(len(PROMPTS))]
    return [
        DecodeState(prompts, max_new_tokens=NEW_TOKENS, first_sequence=number, **options)
        for prompts, number in zip(PROMPTS, first, strict=True)
    ]


def tokens(decoded: list[DecodeState]) -> list[list[list[int]]]:
    return [[state.tokens(row) for row in range(state.batch_size)] for state in decoded]


def run_layouts(rank: int, world_size: int, layouts: list[Layout]) -> list[dict[str, Any]]:
    return [run_layout(*layout) for layout in layouts]


def run_layout(
    kind: str, pp_size: int, tp_size: int, layers: tuple[int, ...] | None
) -> dict[str, Any]:
    """What a rank knows at the end of several runs over one layout."""
    from flashhead_dist.integrations.pipeline import PipelineDecoder

    pipeline = PipelineDecoder(
        lambda: tiny(kind), pp_size=pp_size, tp_size=tp_size, layers_per_stage=layers
    )
    right = choice(tiny(kind), pipeline.tp, 0.0) if pipeline.is_last else None
    wrong = often_wrong(right) if right else None
    draw = choice(tiny(kind), pipeline.tp, 1.0) if pipeline.is_last else None
    wrong_draw = often_wrong(draw) if draw else None
    plan: list[tuple[str, Choose | None, Choose | None, bool, dict[str, Any]]] = [
        ("together", right, None, False, {}),
        ("flushed", right, None, True, {}),
        ("wrong", wrong, None, False, {}),
        ("stopping", right, None, False, {"stop_token_ids": STOPS}),
        ("lossless", wrong, right, False, {"check_every": 4}),
        ("lossless_stopping", wrong, right, False, {"check_every": 3, "stop_token_ids": STOPS}),
        ("drawn", draw, None, False, {}),
        ("lossless_drawn", wrong_draw, draw, False, {"check_every": 4}),
    ]
    results: dict[Any, Any] = {"num_layers": pipeline.num_layers}
    for name, choose, confirm, flushed, options in plan:
        batches = states(**options)
        _, stages = pipeline.decode(batches, choose, confirm=confirm, flushed=flushed)
        results[name] = tokens(batches)
        results[name, "counts"] = [vars(batch.counts) for batch in batches]
        results[name, "steps"] = [len(stage.compute_s) for stage in stages]
    return results


def cut_at(texts: list[list[list[int]]], stops: frozenset[int]) -> list[list[list[int]]]:
    def cut(text: list[int]) -> list[int]:
        ends = [place for place, token in enumerate(text) if token in stops]
        return text[: ends[0] + 1] if ends else text

    return [[cut(text) for text in batch] for batch in texts]


@pytest.fixture(scope="module")
def results(run_ranks: Callable[..., list[Any]]) -> dict[Layout, list[dict[str, Any]]]:
    """Every rank's results by layout; starting processes is what takes the time."""
    found = {}
    for layouts in (TWO_RANKS, FOUR_RANKS):
        world_size = layouts[0][1] * layouts[0][2]
        for layout, ranks in zip(
            layouts, zip(*run_ranks(run_layouts, world_size, layouts), strict=True), strict=True
        ):
            found[layout] = list(ranks)
    return found


@pytest.mark.parametrize("layout", TWO_RANKS + FOUR_RANKS)
def test_pipelines_decode_what_transformers_decodes(
    results: dict[Layout, list[dict[str, Any]]], layout: Layout
) -> None:
    kind, pp_size, tp_size, layers = layout
    expected = references(kind)
    assert all(len(set(text)) > 4 for batch in expected for text in batch)
    stopped = cut_at(expected, STOPS)
    assert stopped != expected
    drawn = unsharded_draws(kind)
    assert drawn != expected
    counts = layers or (3, 2)
    first = results[layout][0]
    for rank, result in enumerate(results[layout]):
        assert result["num_layers"] == counts[rank // tp_size]
        assert result["together"] == expected
        assert result["flushed"] == expected
        assert result["stopping"] == stopped
        # Every stage took every step of every micro-batch, none in vain.
        assert result["together", "steps"] == [NEW_TOKENS * len(PROMPTS)] * pp_size
        # Without differences lossless mode would have nothing to mend.
        assert result["wrong"] == first["wrong"] != expected
        assert result["lossless"] == expected
        assert result["lossless", "counts"] == first["lossless", "counts"]
        assert all(counts["discarded"] for counts in result["lossless", "counts"])
        assert result["lossless_stopping"] == stopped
        assert result["drawn"] == result["lossless_drawn"] == drawn
