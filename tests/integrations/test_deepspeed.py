"""DeepSpeed-Inference shards the body under our heads: the unsharded tokens at any tp_size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM

from flashhead_dist.decode.body import TransformersBody, share_embedding
from flashhead_dist.decode.loop import Choose, decode
from flashhead_dist.decode.sequences import DecodeState
from flashhead_dist.errors import UserError
from flashhead_dist.heads.base import Head
from flashhead_dist.heads.registry import HeadBuilder
from flashhead_dist.index import IndexOptions, build_index
from flashhead_dist.integrations.deepspeed import (
    DeepSpeedCalls,
    communication_log,
    drop_head,
    shard_body,
)
from flashhead_dist.models import open_model
from flashhead_dist.parallel import TensorParallel
from tests.integrations.small_models import greedy_text, small_model

VOCAB, HIDDEN, STEPS = 509, 64, 12
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12, 13]]
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "head_dim": 16,
    "initializer_range": 0.3,
}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"tie_word_embeddings": True},
    "gemma3_text": {"num_key_value_heads": 1, "tie_word_embeddings": True},
}


@pytest.fixture(scope="module")
def models(own_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small models with an index each, in `<kind>` and `<kind>-index`."""
    folder = tmp_path_factory.mktemp("models")
    for kind, options in KINDS.items():
        model = small_model(kind, seed=1, **(SHAPE | options))
        # Weights as initialized are so small that every token ties: norms of 1 and logits apart.
        model.save_pretrained(folder / kind)
        build_index(
            open_model(str(folder / kind)),
            IndexOptions(num_groups=8, num_probes=64, cluster_size=4),
            calibration=None,
            test=None,
            out=folder / f"{kind}-index",
            device="cpu",
            progress=False,
        )
    return {kind: folder / kind for kind in KINDS}


def unsharded(folder: Path) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return [greedy_text(model, prompt, STEPS) for prompt in PROMPTS]


def greedy(head: Head) -> Choose:
    def choose(hidden: Tensor, positions: Tensor, sequences: Tensor) -> Tensor:
        return head(hidden).token_ids[:, 0]

    return choose


def sharded(folder: Path, name: str, calls: DeepSpeedCalls) -> dict[str, Any]:
    """One head over one sharded body: texts, logged collectives, what this rank holds."""
    group = dist.group.WORLD
    tp = TensorParallel.from_group(group, calls=calls)
    index = folder.with_name(f"{folder.name}-index")
    source = open_model(str(folder))
    head = HeadBuilder(tp=tp, model=source, index_dir=index, dtype=torch.float32).build(name)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    shared = share_embedding(model, head, TensorParallel.from_group(group))
    drop_head(model)
    model = shard_body(model, group, torch.float32)
    state = DecodeState(PROMPTS, max_new_tokens=STEPS)
    with communication_log() as log:
        decode(TransformersBody(model), state, greedy(head))
    return {
        "texts": [state.tokens(row) for row in range(len(PROMPTS))],
        "log": {(item.name, item.message_bytes): item.num_calls for item in log},
        "shared": shared,
        "embedding_parameters": sum(p.numel() for p in model.get_input_embeddings().parameters()),
        "largest_linear": max(
            p.shape[0] for name, p in model.named_parameters() if name.endswith("gate_proj.weight")
        ),
    }


def on_rank(
    rank: int, world_size: int, folders: dict[str, Path]
) -> dict[tuple[str, str], dict[str, Any]]:
    calls = DeepSpeedCalls()
    return {
        (kind, name): sharded(folder, name, calls)
        for kind, folder in folders.items()
        for name in ("dense_local_max", "flashhead")
    }


@pytest.fixture(scope="module", params=[2, 3, 5])
def runs(
    request: pytest.FixtureRequest,
    run_ranks: Callable[..., list[Any]],
    models: dict[str, Path],
) -> tuple[int, list[dict[Any, Any]]]:
    """tp_size, and what each rank found; a process costs seconds, so each does all there is."""
    return request.param, run_ranks(on_rank, request.param, models)


def test_a_sharded_body_decodes_the_unsharded_tokens(
    runs: tuple[int, list[dict[Any, Any]]], models: dict[str, Path]
) -> None:
    expected = {kind: unsharded(folder) for kind, folder in models.items()}
    # Random tied models repeat their last token.
    assert all(len(set(text)) > 3 for text in expected["llama"])
    for found in runs[1]:
        for kind in KINDS:
            for name in ("dense_local_max", "flashhead"):
                assert found[kind, name]["texts"] == expected[kind], (kind, name)


def test_the_body_is_sharded_and_a_tied_embedding_is_held_once(
    runs: tuple[int, list[dict[Any, Any]]],
) -> None:
    _, ranks = runs
    for kind in KINDS:
        rows = [found[kind, "flashhead"]["largest_linear"] for found in ranks]
        assert sum(rows) == SHAPE["intermediate_size"]
        assert max(rows) < SHAPE["intermediate_size"]
        # The fifth rank has no attention head left: llama has two key-value heads, Gemma one.
        for found in ranks:
            tied = kind != "llama"
            assert found[kind, "flashhead"]["shared"] is tied
            held = found[kind, "flashhead"]["embedding_parameters"]
            assert held == (0 if tied else VOCAB * HIDDEN)


def test_the_communication_log_separates_head_from_body(
    runs: tuple[int, list[dict[Any, Any]]],
) -> None:
    """The head's exchange is 8 bytes a row and step."""
    for found in runs[1]:
        for name in ("dense_local_max", "flashhead"):
            log = found["llama", name]["log"]
            head = {key: calls for key, calls in log.items() if key[0].startswith("head")}
            assert head == {("head_all_reduce", 8 * len(PROMPTS)): STEPS}
            body = {key: calls for key, calls in log.items() if not key[0].startswith("head")}
            # Two all-reduces a layer: attention and MLP.
            hidden_bytes = len(PROMPTS) * HIDDEN * 4
            assert body["all_reduce", hidden_bytes] == 2 * SHAPE["num_hidden_layers"] * (STEPS - 1)


def test_a_model_without_a_linear_head_is_refused(models: dict[str, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(models["llama"])
    drop_head(model)
    with pytest.raises(UserError, match="no linear output head"):
        drop_head(model)
