"""Where a head's greedy text parts from the dense one: by the dense text's states, and for real."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from flashhead_dist.decode.prompts import Prompt, held_out_prompts
from flashhead_dist.errors import UserError
from flashhead_dist.evaluate.texts import (
    TextDecoder,
    TextRecord,
    append_records,
    compare_texts,
    first_difference,
    read_records,
    summarize,
)
from flashhead_dist.heads.base import Head
from flashhead_dist.heads.registry import build_head
from flashhead_dist.models import ModelSource, open_model
from flashhead_dist.parallel import TensorParallel
from flashhead_dist.states.split import split_by_document
from flashhead_dist.states.texts import shipped_texts

if TYPE_CHECKING:
    from tests.integrations.transformers_zoo import Pair, Zoo

LENGTH = 24
PROMPTS = [Prompt("short", "ab"), Prompt("long", "abcdefgh"), Prompt("long", "hgfedc")]
PROMPTS += [Prompt("short", f"x{letter}") for letter in "acegikmoqsuwy"]


class _Letters:
    """A tokenizer whose tokens are letters."""

    pad_token_id = 0

    def __call__(self, text: str) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[2, *(3 + ord(letter) for letter in text)])

    def decode(self, token_ids: list[int]) -> str:
        return " ".join(map(str, token_ids))


@pytest.fixture(scope="module")
def pair(zoo: Zoo) -> Pair:
    return zoo.pair("gemma3")


@pytest.fixture(scope="module")
def model(pair: Pair) -> ModelSource:
    """The model from its folder, with a tokenizer."""
    opened = open_model(str(pair.folder / "model"))
    return replace(opened, body_loader=lambda dtype: (pair.dense.to(dtype), _Letters()))


@pytest.fixture(scope="module")
def decoder(model: ModelSource) -> TextDecoder:
    return TextDecoder(model, max_new_tokens=LENGTH, batch_size=5)


def lossy_head(model: ModelSource, index: Path, probes: int) -> Head:
    tp = TensorParallel.single()
    return build_head("flashhead", tp=tp, model=model, index_dir=index, num_probes=probes)


@pytest.mark.parametrize("probes", [4, 16])
def test_states_of_the_dense_text_tell_where_a_real_text_parts(
    decoder: TextDecoder, model: ModelSource, pair: Pair, probes: int
) -> None:
    """Fails where states are a step off, of another row, or of an unpadded batch."""
    head = lossy_head(model, pair.index, probes)
    places = []
    for batch in decoder.batches(PROMPTS):
        texts = decoder.dense_texts(batch)
        records = compare_texts(head, texts, decoder.stop_token_ids, key="k", label="l")
        real, _ = decoder.decode(batch, head)
        for row, record in enumerate(records):
            place = first_difference(texts.token_ids[row], real[row])
            assert place == record.first_difference
            if place is not None:
                assert int(real[row, place]) == record.head_token
                assert int(texts.token_ids[row, place]) == record.dense_token
            places.append(place)
    assert [record.prompt for record in records] == [15]
    differing = [place for place in places if place is not None]
    assert len(set(differing)) > 2
    if probes == 16:
        assert None in places


def test_dense_states_give_the_dense_text(decoder: TextDecoder, model: ModelSource) -> None:
    dense = build_head("dense_local_max", tp=TensorParallel.single(), model=model)
    for batch in decoder.batches(PROMPTS):
        texts = decoder.dense_texts(batch)
        assert texts.token_ids.shape == (len(batch.prompts), LENGTH)
        for record in compare_texts(dense, texts, frozenset(), key="k", label="l"):
            assert record.first_difference is None
            assert record.agreeing == record.num_tokens == LENGTH


def test_a_text_decoded_once_is_kept(decoder: TextDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = decoder.batches(PROMPTS)[0]
    first = decoder.dense_texts(batch)

    def fail(*_: Any) -> Any:
        raise AssertionError("decoded again")

    monkeypatch.setattr(decoder, "decode", fail)
    again = decoder.dense_texts(batch)
    assert torch.equal(first.token_ids, again.token_ids)
    assert torch.equal(first.states, again.states)
    with pytest.raises(AssertionError, match="decoded again"):
        decoder.dense_texts(replace(batch, token_ids=batch.token_ids[1:]))


def test_what_does_not_fit_is_refused(decoder: TextDecoder, model: ModelSource) -> None:
    with pytest.raises(UserError, match="prompt 1 has 131 tokens"):
        decoder.batches([Prompt("long", "a" * 130)])
    with pytest.raises(UserError, match="--max-new-tokens 0"):
        TextDecoder(model, max_new_tokens=0, batch_size=1)
    with pytest.raises(UserError, match="--batch-size 0"):
        TextDecoder(model, max_new_tokens=1, batch_size=0)


def record(prompt: int, place: int | None, *, ends_at: int | None = None) -> TextRecord:
    tokens = (None, None) if place is None else (1, 2)
    return TextRecord("k", "flashhead", prompt, "en", 10, place, *tokens, 9, ends_at)


def test_records_are_appended_and_a_line_cut_short_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "texts.jsonl"
    assert read_records(path) == []
    append_records(path, [record(0, 3)])
    append_records(path, [record(1, None)])
    assert read_records(path) == [record(0, 3), record(1, None)]
    whole = path.read_text()
    path.write_text(whole[:-20])
    assert read_records(path) == [record(0, 3)]
    path.write_text('{"other": 1}\n' + whole)
    with pytest.raises(UserError, match=r"line 1 of .*texts\.jsonl is no record"):
        read_records(path)


def test_the_summary_counts_texts_and_censors_those_that_never_differ() -> None:
    found = summarize([record(0, 3), record(1, 7), record(2, None), record(3, None), record(4, 9)])
    assert found.identical.value == pytest.approx(0.4)
    assert 0.1 < found.identical.low < 0.4 < found.identical.high < 0.8
    assert found.median_first_difference.value == 9
    assert found.median_first_difference.high == math.inf
    assert found.median_of_differing is not None
    assert found.median_of_differing.value == 7
    assert found.token_agreement == pytest.approx(0.9)
    assert found.to_json()["median_first_difference"]["high"] is None
    same = summarize([record(0, None), record(1, None)])
    assert same.median_of_differing is None
    assert same.to_json()["median_first_difference"]["value"] is None


def test_a_difference_after_the_first_stop_leaves_the_text_as_it_is() -> None:
    found = summarize([record(0, 6, ends_at=5), record(1, 5, ends_at=5), record(2, None)])
    assert found.identical.value == pytest.approx(1 / 3)
    assert found.identical_to_end.value == pytest.approx(2 / 3)


def test_held_out_prompts_are_of_test_documents_and_mixed_from_the_start() -> None:
    prompts = held_out_prompts(100)
    assert len({prompt.text for prompt in prompts}) == 100
    documents = shipped_texts()
    parts = split_by_document(documents)
    calibrating = "\n".join(
        d.text for d, part in zip(documents, parts, strict=True) if part == "calibration"
    )
    # A formula of politeness may open two passages; a question or a problem comes once.
    long = [prompt for prompt in prompts if prompt.source in ("mt_bench", "gsm8k")]
    assert len(long) > 40
    assert not any(prompt.text.strip() in calibrating for prompt in long)
    first = {prompt.source for prompt in prompts[:20]}
    assert {"mt_bench", "gsm8k"} < first
    assert len(first) > 6
    assert prompts[:20] == held_out_prompts(20)
    with pytest.raises(UserError, match="more than the"):
        held_out_prompts(1000)
