"""Greedy texts of heads beside the dense one: first differences, records, and the command."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
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
from flashhead_dist.states.split import shipped_texts, split_by_document
from tests.integrations.transformers_models import make_index

if TYPE_CHECKING:
    from tests.integrations.transformers_zoo import Pair, Zoo

LAUNCH = Path(__file__).parents[2] / "launch"
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
def test_dense_states_predict_the_first_difference_of_a_decoded_text(
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


def test_dense_texts_are_cached(decoder: TextDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_prompts_and_sizes_that_do_not_fit_are_refused(
    decoder: TextDecoder, model: ModelSource
) -> None:
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


@pytest.fixture(scope="module")
def weak_index(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that probes a cluster a group, so that its texts part soon."""
    return make_index(pair.dense, tmp_path_factory.mktemp("weak"), num_probes=4)


@pytest.fixture
def launch(
    model: ModelSource, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[ModuleType]:
    """The command over a small model that has a tokenizer, with a cache of its own."""
    monkeypatch.syspath_prepend(str(LAUNCH))
    monkeypatch.setenv("FLASHHEAD_CACHE", str(tmp_path / "cache"))
    command = importlib.import_module("evaluate")
    options = importlib.import_module("options")
    monkeypatch.setattr(options, "open_model", lambda name, **rest: model)
    yield command
    for name in ("evaluate", "evaluate_texts"):
        importlib.sys.modules.pop(name, None)  # type: ignore[attr-defined]


@pytest.fixture
def arguments(pair: Pair, weak_index: Path, tmp_path: Path) -> list[str]:
    prompts = tmp_path / "letters.txt"
    prompts.write_text("\n".join(["ab", "abcdef", "x", "hgfedc", "zz", "qrs", "tuvw"]))
    return [
        "texts", "--prompts", str(prompts), "--max-new-tokens", "12", "--batch-size", "3",
        "--heads", f"flashhead@{weak_index}", f"flashhead_global@{pair.index}", "dense_local_max",
        "--out", str(tmp_path / "texts.jsonl"), "--threads", "1", "--json",
    ]  # fmt: skip


def test_command_compares_heads_and_decoded_texts_agree_with_the_records(
    launch: ModuleType, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch.main([*arguments, "--verify", "4"]) == 0
    document = json.loads(capsys.readouterr().out)
    names = [head["head"].partition("@")[0] for head in document["heads"]]
    assert names == ["flashhead", "flashhead_global", "dense_local_max"]
    for head in document["heads"]:
        assert head["num_texts"] == 7
        # Four prompts are in the first two batches of three.
        assert head["verified_texts"] == head["verified_equal"] == 6
    assert document["heads"][0]["token_agreement"] < 1
    assert document["heads"][2]["identical"]["value"] == 1
    assert document["heads"][2]["bytes_share"] == pytest.approx(2)  # its rows are in float32
    lines = (tmp_path / "texts.jsonl").read_text().splitlines()
    assert len(lines) == 21
    assert {json.loads(line)["source"] for line in lines} == {"letters"}
    assert launch.main(arguments[:-1]) == 0
    assert "inf" in capsys.readouterr().out


def test_an_interrupted_command_resumes(
    launch: ModuleType,
    arguments: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original, calls = TextDecoder.decode, []

    def decode(decoder: Any, batch: Any, *rest: Any) -> Any:
        calls.append(batch.first)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(decoder, batch, *rest)

    monkeypatch.setattr(TextDecoder, "decode", decode)
    assert launch.main(arguments) == 130
    out = tmp_path / "texts.jsonl"
    assert len(out.read_text().splitlines()) == 9
    capsys.readouterr()
    assert launch.main(arguments) == 0
    assert calls == [0, 3, 3, 6]
    whole = json.loads(capsys.readouterr().out)
    lines = out.read_text().splitlines()
    assert len(lines) == len(set(lines)) == 21
    # A third run finds all of it, and says the same.
    assert launch.main(arguments) == 0
    assert json.loads(capsys.readouterr().out) == whole
    assert len(calls) == 4
    # Another length is another text: its records do not pass for the old ones.
    arguments[arguments.index("12")] = "10"
    assert launch.main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["heads"][0]["num_tokens"] == 70


def test_mistakes_of_the_command_are_one_sentence(
    launch: ModuleType, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    cases = {
        "'nosuch'": ["texts", "--heads", "nosuch"],
        "nowhere holds no index": ["texts", "--heads", "flashhead@nowhere"],
        "'many' in flashhead:many": ["texts", "--heads", "flashhead:many"],
        "num_probes 999": [*arguments, "--heads", arguments[8].replace("@", ":999@")],
        "--num-prompts is 0": [*arguments, "--num-prompts", "0"],
        "--batch-size is 0": [*arguments, "--batch-size", "0"],
        "prompt 1 has 3 tokens": [*arguments, "--max-new-tokens", "126"],
    }
    for value, given in cases.items():
        assert launch.main(given) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.splitlines()[-1].startswith("error: ")
        assert value in captured.err
        assert "Traceback" not in captured.err
