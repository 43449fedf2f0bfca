"""Speculative decoding with an EAGLE draft: the text is the target's, whatever is proposed.

Likely mistakes: the target's or the draft's cache is not rolled back, a proposal is compared with
the choice one place on, states of refused proposals are given to the draft as true ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flashhead_dist.decode.loop import Choose
from flashhead_dist.errors import UserError
from flashhead_dist.heads.base import Head
from flashhead_dist.heads.registry import HeadBuilder
from flashhead_dist.heads.sampling import SamplingParameters, choose_tokens
from flashhead_dist.index import IndexOptions, build_index
from flashhead_dist.integrations.eagle import (
    DraftCounts,
    DraftDecoder,
    EagleDraft,
    frequent_token_ids,
    load_draft,
    over_full_vocabulary,
    read_states,
    train_draft,
)
from flashhead_dist.models import ModelSource, ModelSourceError, open_model
from flashhead_dist.models.base import reduce_vocabulary
from flashhead_dist.parallel import TensorParallel
from tests.integrations.transformers_models import VOCAB_SIZE, make_index, make_model

NEW_TOKENS = 28
PROMPTS = [[5, 17, 301, 44, 78], [9, 400, 33], [250, 250, 61, 7, 128, 90, 12, 480]]
GREEDY = SamplingParameters()
SAMPLED = SamplingParameters(temperature=0.7, seed=11)


@dataclass
class Target:
    """A small model, an index that probes everything, and a draft of the model's own texts."""

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
        decoder = DraftDecoder(
            self.model,
            chooser(self.head("dense_local_max"), parameters),
            options.pop("draft", self.draft),
            draft_head,
        )
        options = {"max_new_tokens": NEW_TOKENS} | options
        return decoder.decode(prompt, num_drafts=num_drafts, **options)

    def text(self, prompt: list[int]) -> list[int]:
        """The text that transformers itself generates."""
        return generate(self.model, prompt)[len(prompt) :]


def chooser(head: Head, parameters: SamplingParameters = GREEDY) -> Choose:
    def choose(hidden: Tensor, positions: Tensor, sequences: Tensor) -> Tensor:
        return choose_tokens(head, hidden, positions, sequences, parameters)

    return choose


def generate(model: Any, prompt: list[int]) -> list[int]:
    found = model.generate(
        torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None
    )
    tokens: list[int] = found[0].tolist()
    return tokens


def make_target(kind: str, folder: Path) -> Target:
    """Gemma-3 attends over a sliding window of 16 tokens in its first layer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLASHHEAD_CACHE", str(folder / "cache"))
        model = make_model(kind, tied=False)
        index = make_index(model, folder, num_probes=128)
        texts = [generate(model, prompt) for prompt in PROMPTS]
        draft = train_draft(
            model, read_states(model, texts, progress=False),
            num_epochs=30, learning_rate=3e-3, batch_tokens=64,
        )  # fmt: skip
        return Target(model, open_model(str(folder / "model")), index, draft)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return make_target("gemma3", tmp_path_factory.mktemp("gemma3"))


def test_another_model_type_drafts_too(tmp_path: Path) -> None:
    target = make_target("llama", tmp_path)
    text, counts = target.decode(PROMPTS[1], 4, chooser(target.head("flashhead")))
    assert text == target.text(PROMPTS[1])
    assert counts.acceptance > 0.1


@pytest.mark.parametrize("num_drafts", [0, 1, 4])
def test_greedy_text_is_the_targets_own(target: Target, num_drafts: int) -> None:
    head = chooser(target.head("flashhead"))
    total = DraftCounts()
    for prompt in PROMPTS:
        text, counts = target.decode(prompt, num_drafts, head)
        assert text == target.text(prompt)
        total.add(counts)
    if num_drafts:
        # Neither all nor none were accepted: rollbacks of every length are covered.
        assert 0.1 < total.acceptance < 0.95
        assert total.passes < len(PROMPTS) * NEW_TOKENS
    else:
        assert total.passes == len(PROMPTS) * NEW_TOKENS


def test_drawn_text_is_the_targets_own(target: Target) -> None:
    """Draft and target draw with the same noise, so that proposals are accepted here too."""
    draft_head = chooser(target.head("flashhead"), SAMPLED)
    total = DraftCounts()
    for number, prompt in enumerate(PROMPTS):
        plain, _ = target.decode(prompt, 0, draft_head, parameters=SAMPLED, sequence=number)
        text, counts = target.decode(prompt, 3, draft_head, parameters=SAMPLED, sequence=number)
        assert text == plain
        assert text != target.text(prompt)
        total.add(counts)
    assert total.acceptance > 0


def test_an_untrained_draft_costs_time_and_no_token(target: Target) -> None:
    torch.manual_seed(0)
    untrained = EagleDraft(target.model.config).eval()
    head = chooser(target.head("dense_local_max"))
    trained, wild = DraftCounts(), DraftCounts()
    for prompt in PROMPTS[:2]:
        text, counts = target.decode(prompt, 3, head, draft=untrained)
        assert text == target.text(prompt)
        wild.add(counts)
        trained.add(target.decode(prompt, 3, head)[1])
    assert wild.acceptance < trained.acceptance / 2


def test_a_text_ends_at_its_stop_token(target: Target) -> None:
    head = chooser(target.head("dense_local_max"))
    whole = target.text(PROMPTS[0])
    for place in (0, 7):
        stop = whole[place]
        expected = whole[: whole.index(stop) + 1]
        for num_drafts in (0, 5):
            text, _ = target.decode(PROMPTS[0], num_drafts, head, stop_token_ids=frozenset({stop}))
            assert text == expected


def test_a_reduced_vocabulary_changes_acceptance_and_no_text(
    target: Target, tmp_path: Path
) -> None:
    texts = [target.text(prompt) for prompt in PROMPTS]
    token_ids = frequent_token_ids(texts[:1], VOCAB_SIZE, 100)
    assert set(texts[0]) <= set(token_ids.tolist())
    few = reduce_vocabulary(target.source, token_ids)
    assert torch.equal(
        few.read_rows(3, 90), target.source.read_rows(0, VOCAB_SIZE)[token_ids[3:90]]
    )
    assert torch.equal(few.read_columns(5, 9), target.source.read_columns(5, 9)[token_ids])
    assert few.weight_hash != target.source.weight_hash
    index = build_index(
        few, IndexOptions(num_groups=4, num_probes=28, alpha=0.0),
        calibration=None, test=None, out=tmp_path / "index", device="cpu", progress=False,
    )  # fmt: skip
    accepted = {}
    for name in ("dense_local_max", "flashhead"):
        head = over_full_vocabulary(chooser(target.head(name, few, index)), token_ids)
        found = [target.decode(prompt, 4, head) for prompt in PROMPTS]
        assert [text for text, _ in found] == texts
        accepted[name] = [counts.accepted_at for _, counts in found]
    assert accepted["dense_local_max"] == accepted["flashhead"]
    assert sum(accepted["flashhead"][0]) > 0


def test_token_ids_are_chosen_by_use_and_then_by_number() -> None:
    assert frequent_token_ids([[7, 7, 3], [9]], 12, 5).tolist() == [0, 1, 3, 7, 9]
    with pytest.raises(UserError, match="draft vocabulary of 13 tokens"):
        frequent_token_ids([], 12, 13)


@pytest.mark.parametrize("ids", [[], [3, 2], [1, 1], [-1, 4], [4, VOCAB_SIZE]])
def test_ids_that_are_no_vocabulary_are_refused(target: Target, ids: list[int]) -> None:
    with pytest.raises(ModelSourceError, match="make no reduced vocabulary"):
        reduce_vocabulary(target.source, torch.tensor(ids, dtype=torch.int64))


def test_a_saved_draft_loads_for_its_own_target_only(target: Target, tmp_path: Path) -> None:
    folder = tmp_path / "draft"
    target.draft.save(folder, {"model": "small", "weight_hash": "abc"})
    again = load_draft(folder, target.model, "abc")
    states, embeddings = torch.randn(2, 1, 5, target.draft.hidden_size).unbind()
    with torch.inference_mode():
        assert torch.equal(again(states, embeddings), target.draft(states, embeddings))
    with pytest.raises(UserError, match="another output embedding"):
        load_draft(folder, target.model, "abd")
    (folder / "draft.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match="no readable draft model"):
        load_draft(folder, target.model, "abc")


def test_training_reports_every_batch_and_its_loss_falls(target: Target) -> None:
    losses: list[float] = []
    texts = read_states(target.model, [target.text(p) for p in PROMPTS], progress=False)
    train_draft(target.model, texts, num_epochs=8, learning_rate=3e-3, on_batch=losses.append)
    assert len(losses) == 8
    assert losses[-1] < 0.8 * losses[0]


def test_values_out_of_range_are_refused(target: Target) -> None:
    head = chooser(target.head("dense_local_max"))
    with pytest.raises(UserError, match="empty"):
        target.decode([], 2, head)
    with pytest.raises(UserError, match="-1 drafts a round"):
        target.decode(PROMPTS[0], -1, head)
    with pytest.raises(UserError, match="0 new tokens"):
        target.decode([1], 1, head, max_new_tokens=0)
