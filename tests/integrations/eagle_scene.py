"""A small model, its index, and a draft trained on the model's own texts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashhead_dist.decode.loop import Choose
from flashhead_dist.heads.base import Head
from flashhead_dist.heads.registry import HeadBuilder
from flashhead_dist.heads.sampling import SamplingParameters, choose_tokens
from flashhead_dist.integrations.eagle import EagleDraft
from flashhead_dist.integrations.eagle_decode import DraftCounts, decode_with_draft
from flashhead_dist.integrations.eagle_train import read_states, train_draft
from flashhead_dist.models import ModelSource, open_model
from flashhead_dist.parallel import TensorParallel
from tests.integrations.transformers_models import make_index, make_model

NEW_TOKENS = 28
PROMPTS = [[5, 17, 301, 44, 78], [9, 400, 33], [250, 250, 61, 7, 128, 90, 12, 480]]
GREEDY = SamplingParameters()
DRAWN = SamplingParameters(temperature=0.7, seed=11)


@dataclass
class Scene:
    """What a test decodes with. The index probes everything."""

    model: Any
    source: ModelSource
    index: Path
    draft: EagleDraft

    def head(self, name: str, source: ModelSource | None = None, index: Path | None = None) -> Head:
        builder = HeadBuilder(
            tp=TensorParallel.single(torch.device("cpu")),
            model=source or self.source,
            index_dir=index or self.index,
            dtype=torch.float32,
        )
        return builder.build(name)

    def decode(
        self,
        prompt: list[int],
        num_drafts: int,
        draft_head: Choose,
        *,
        parameters: SamplingParameters = GREEDY,
        **options: Any,
    ) -> tuple[list[int], DraftCounts]:
        return decode_with_draft(
            self.model,
            chooser(self.head("dense_local_max"), parameters),
            options.pop("draft", self.draft),
            draft_head,
            prompt,
            max_new_tokens=NEW_TOKENS,
            num_drafts=num_drafts,
            **options,
        )


def chooser(head: Head, parameters: SamplingParameters = GREEDY) -> Choose:
    def choose(hidden: Tensor, positions: Tensor, sequences: Tensor) -> Tensor:
        return choose_tokens(head, hidden, positions, sequences, parameters)

    return choose


def build_scene(kind: str, place: Path) -> Scene:
    """Gemma-3 attends over a sliding window of 16 tokens in its first layer."""
    model = make_model(kind, tied=False)
    index = make_index(model, place, num_probes=128)
    texts = [_greedy(model, prompt) for prompt in PROMPTS]
    draft = train_draft(
        model, read_states(model, texts, progress=False),
        num_epochs=30, learning_rate=3e-3, batch_tokens=64,
    )  # fmt: skip
    return Scene(model, open_model(str(place / "model")), index, draft)


def _greedy(model: Any, prompt: list[int]) -> list[int]:
    found = model.generate(
        torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None
    )
    tokens: list[int] = found[0].tolist()
    return tokens


def greedy_text(scene: Scene, prompt: list[int]) -> list[int]:
    """What transformers itself generates."""
    return _greedy(scene.model, prompt)[len(prompt) :]
