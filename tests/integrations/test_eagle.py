"""Speculative decoding with an EAGLE draft: the text is the target's, whatever is proposed.

What these are after: the target's cache not taken back, the draft's cache not taken back, a
proposal compared with the choice one place on, states of refused proposals told to the draft as
true ones.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flashhead_dist.errors import UserError
from flashhead_dist.index import IndexOptions, build_index
from flashhead_dist.integrations.draft_vocabulary import frequent_token_ids, over_whole_vocabulary
from flashhead_dist.integrations.eagle import EagleDraft, load_draft
from flashhead_dist.integrations.eagle_decode import DraftCounts, decode_with_draft
from flashhead_dist.integrations.eagle_train import read_states, train_draft
from flashhead_dist.models import ModelSourceError
from flashhead_dist.models.subset import reduce_vocabulary
from tests.integrations.eagle_scene import (
    DRAWN,
    NEW_TOKENS,
    PROMPTS,
    Scene,
    build_scene,
    chooser,
    greedy_text,
)
from tests.integrations.transformers_models import VOCAB_SIZE


def build(kind: str, place: Path) -> Scene:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLASHHEAD_CACHE", str(place / "cache"))
        return build_scene(kind, place)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return build("gemma3", tmp_path_factory.mktemp("gemma3"))


def test_another_kind_of_model_drafts_too(tmp_path: Path) -> None:
    scene = build("llama", tmp_path)
    text, counts = scene.decode(PROMPTS[1], 4, chooser(scene.head("flashhead")))
    assert text == greedy_text(scene, PROMPTS[1])
    assert counts.acceptance > 0.1


@pytest.mark.parametrize("num_drafts", [0, 1, 4])
def test_greedy_text_is_the_targets_own(scene: Scene, num_drafts: int) -> None:
    head = chooser(scene.head("flashhead"))
    total = DraftCounts()
    for prompt in PROMPTS:
        text, counts = scene.decode(prompt, num_drafts, head)
        assert text == greedy_text(scene, prompt)
        total.add(counts)
    if num_drafts:
        # Neither all nor none of the proposals stood: rollbacks of every kind were needed.
        assert 0.1 < total.acceptance < 0.95
        assert total.passes < len(PROMPTS) * NEW_TOKENS
    else:
        assert total.passes == len(PROMPTS) * NEW_TOKENS


def test_a_retrieval_head_proposes_what_a_dense_one_does(scene: Scene) -> None:
    """Where it probes everything."""
    for prompt in PROMPTS[:2]:
        dense, of_dense = scene.decode(prompt, 4, chooser(scene.head("dense_local_max")))
        found, of_found = scene.decode(prompt, 4, chooser(scene.head("flashhead")))
        assert found == dense
        assert of_found.accepted_at == of_dense.accepted_at


def test_drawn_text_is_the_targets_own(scene: Scene) -> None:
    """Draft and target draw with the same noise, so that proposals stand here too."""
    draft_head = chooser(scene.head("flashhead"), DRAWN)
    total = DraftCounts()
    for number, prompt in enumerate(PROMPTS):
        plain, _ = scene.decode(prompt, 0, draft_head, parameters=DRAWN, sequence=number)
        text, counts = scene.decode(prompt, 3, draft_head, parameters=DRAWN, sequence=number)
        assert text == plain
        assert text != greedy_text(scene, prompt)
        total.add(counts)
    assert total.acceptance > 0


def test_an_untrained_draft_costs_time_and_no_token(scene: Scene) -> None:
    torch.manual_seed(0)
    untrained = EagleDraft(scene.model.config).eval()
    head = chooser(scene.head("dense_local_max"))
    trained, wild = DraftCounts(), DraftCounts()
    for prompt in PROMPTS[:2]:
        text, counts = scene.decode(prompt, 3, head, draft=untrained)
        assert text == greedy_text(scene, prompt)
        wild.add(counts)
        trained.add(scene.decode(prompt, 3, head)[1])
    assert wild.acceptance < trained.acceptance / 2


def test_a_text_ends_at_its_stop_token(scene: Scene) -> None:
    head = chooser(scene.head("dense_local_max"))
    whole = greedy_text(scene, PROMPTS[0])
    for place in (0, 7):
        stop = whole[place]
        expected = whole[: whole.index(stop) + 1]
        for num_drafts in (0, 5):
            text, _ = scene.decode(PROMPTS[0], num_drafts, head, stop_token_ids=frozenset({stop}))
            assert text == expected


def test_a_reduced_vocabulary_changes_acceptance_and_no_text(scene: Scene, tmp_path: Path) -> None:
    texts = [greedy_text(scene, prompt) for prompt in PROMPTS]
    token_ids = frequent_token_ids(texts[:1], VOCAB_SIZE, 100)
    assert set(texts[0]) <= set(token_ids.tolist())
    few = reduce_vocabulary(scene.source, token_ids)
    assert torch.equal(few.read_rows(3, 90), scene.source.read_rows(0, VOCAB_SIZE)[token_ids[3:90]])
    assert torch.equal(few.read_columns(5, 9), scene.source.read_columns(5, 9)[token_ids])
    assert few.weight_hash != scene.source.weight_hash
    index = build_index(
        few, IndexOptions(num_groups=4, num_probes=28, alpha=0.0),
        calibration=None, test=None, out=tmp_path / "index", device="cpu", progress=False,
    )  # fmt: skip
    accepted = {}
    for name in ("dense_local_max", "flashhead"):
        head = over_whole_vocabulary(chooser(scene.head(name, few, index)), token_ids)
        found = [scene.decode(prompt, 4, head) for prompt in PROMPTS]
        assert [text for text, _ in found] == texts
        accepted[name] = [counts.accepted_at for _, counts in found]
    assert accepted["dense_local_max"] == accepted["flashhead"]
    assert sum(accepted["flashhead"][0]) > 0


def test_token_ids_are_chosen_by_use_and_then_by_number() -> None:
    assert frequent_token_ids([[7, 7, 3], [9]], 12, 5).tolist() == [0, 1, 3, 7, 9]
    with pytest.raises(UserError, match="draft vocabulary of 13 tokens"):
        frequent_token_ids([], 12, 13)


@pytest.mark.parametrize("ids", [[], [3, 2], [1, 1], [-1, 4], [4, VOCAB_SIZE]])
def test_ids_that_are_no_vocabulary_are_refused(scene: Scene, ids: list[int]) -> None:
    with pytest.raises(ModelSourceError, match="make no reduced vocabulary"):
        reduce_vocabulary(scene.source, torch.tensor(ids, dtype=torch.int64))


def test_a_draft_is_kept_and_only_its_own_target_takes_it(scene: Scene, tmp_path: Path) -> None:
    folder = tmp_path / "draft"
    scene.draft.save(folder, {"model": "small", "weight_hash": "abc"})
    again = load_draft(folder, scene.model, "abc")
    states, embeddings = torch.randn(2, 1, 5, scene.draft.hidden_size).unbind()
    with torch.inference_mode():
        assert torch.equal(again(states, embeddings), scene.draft(states, embeddings))
    with pytest.raises(UserError, match="was trained for small with another output embedding"):
        load_draft(folder, scene.model, "abd")
    (folder / "draft.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match="no readable draft model"):
        load_draft(folder, scene.model, "abc")


def test_training_tells_of_every_batch_and_falls(scene: Scene) -> None:
    losses: list[float] = []
    texts = read_states(scene.model, [greedy_text(scene, p) for p in PROMPTS], progress=False)
    train_draft(scene.model, texts, num_epochs=8, learning_rate=3e-3, on_batch=losses.append)
    assert len(losses) == 8
    assert losses[-1] < 0.8 * losses[0]


def test_mistakes_are_named(scene: Scene) -> None:
    head = chooser(scene.head("dense_local_max"))
    with pytest.raises(UserError, match="a prompt is empty"):
        scene.decode([], 2, head)
    with pytest.raises(UserError, match="-1 drafts a round"):
        scene.decode(PROMPTS[0], -1, head)
    with pytest.raises(UserError, match="0 new tokens"):
        decode_with_draft(scene.model, head, scene.draft, head, [1], max_new_tokens=0, num_drafts=1)
