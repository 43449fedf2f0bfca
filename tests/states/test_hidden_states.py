"""Hidden states: the head's own input, split by document, kept once, refused when unusable."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, Gemma3TextConfig, PreTrainedTokenizerFast

from flashhead_dist.errors import UserError
from flashhead_dist.models import ModelSource, open_model
from flashhead_dist.states import collect as collect_module
from flashhead_dist.states import (
    collect_hidden_states,
    require_hidden_size,
)
from flashhead_dist.states.split import (
    Document,
    plan_passages,
    read_texts,
    shipped_texts,
    split_by_document,
)

D = 32
CORPUS = Path(collect_module.__file__).parent.parent / "corpus"


def save_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer of 300 tokens or fewer that starts every text with <bos>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<bos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["some words and more words to learn from"], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>"
    ).save_pretrained(folder)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelSource:
    """A small random Gemma-3 with sliding and full attention, and a tokenizer."""
    monkeypatch.setenv("FLASHHEAD_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=300,
        hidden_size=D,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=8,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
        pad_token_id=0,
    )
    body = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    body.save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    return open_model(str(tmp_path / "model"))


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    lines = [
        {"source": source, "document": f"{source}-{i}", "text": f"{source} text {i} " * (3 + 7 * i)}
        for source in ("one", "two", "three")
        for i in range(5)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_states_are_what_the_output_head_is_given(model: ModelSource, texts: Path) -> None:
    calibration, test = collect_hidden_states(model, texts, max_tokens=10_000, progress=False)
    body, tokenizer = model.load_body()
    documents = read_texts(texts)
    num_checked = 0
    for part in (calibration, test):
        assert part.states.dtype == torch.bfloat16
        for index in part.documents.unique().tolist():
            tokens = tokenizer(documents[index].text, return_tensors="pt").input_ids
            with torch.no_grad():
                whole = body(tokens, output_hidden_states=True).hidden_states[-1][0]
            mine = part.subset(part.documents == index)
            names = {part.sources[i] for i in mine.source_ids.tolist()}
            assert names == {documents[index].source}
            # bf16 keeps 8 bits: one padded or shifted position would be off by far more.
            expected = whole[1 : 1 + len(mine)].to(torch.bfloat16)
            assert torch.allclose(mine.states.float(), expected.float(), rtol=0.01, atol=0.01)
            num_checked += len(mine)
    assert num_checked == len(calibration) + len(test) > 500


def test_parts_share_no_document_and_every_source_is_in_both(
    model: ModelSource, texts: Path
) -> None:
    parts = collect_hidden_states(model, texts, max_tokens=300, progress=False)
    used = [set(part.documents.tolist()) for part in parts]
    assert not used[0] & used[1]
    for part in parts:
        assert set(part.counts()) == {"one", "two", "three"}
    assert 250 <= sum(map(len, parts)) <= 350


def test_special_tokens_are_those_that_the_tokenizer_names(model: ModelSource) -> None:
    assert model.special_token_ids() == (0, 1)
    assert replace(model, tokenizer_loader=None).special_token_ids() == ()
    assert model.path is not None
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model.path / name).unlink()
    assert model.special_token_ids() == ()


def test_second_call_reads_the_cache(model: ModelSource, texts: Path) -> None:
    first = collect_hidden_states(model, texts, max_tokens=300, progress=False)
    bodiless = replace(model, body_loader=None)
    again = collect_hidden_states(bodiless, texts, max_tokens=300, progress=False)
    assert all(torch.equal(a.states, b.states) for a, b in zip(first, again, strict=True))
    with pytest.raises(UserError, match="no body"):
        collect_hidden_states(bodiless, texts, max_tokens=301, progress=False)
    texts.write_text(texts.read_text().replace("text 4", "text four"))
    with pytest.raises(UserError, match="no body"):
        collect_hidden_states(bodiless, texts, max_tokens=300, progress=False)


def test_interruption_leaves_nothing_behind(
    model: ModelSource, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(collect_module, "run_body", interrupted)
        with pytest.raises(KeyboardInterrupt):
            collect_hidden_states(model, texts, progress=False)
    left = [p.name for p in (tmp_path / "cache/hidden_states").iterdir()]
    assert all(name.endswith(".lock") for name in left)
    assert len(collect_hidden_states(model, texts, progress=False)) == 2


def test_overflowing_body_is_refused(
    model: ModelSource, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = collect_module.run_body

    def overflowing(*args: Any, **kwargs: Any) -> list[torch.Tensor]:
        states = [s.clone() for s in real(*args, **kwargs)]
        states[-1][-1, 0] = float("inf")
        return states

    monkeypatch.setattr(collect_module, "run_body", overflowing)
    with pytest.raises(UserError, match=r"NaN or infinity, first in row \d+"):
        collect_hidden_states(model, texts, progress=False)
    assert not list(tmp_path.glob("cache/hidden_states/model-*")), "kept what nobody can use"


def test_single_document_cannot_be_split(model: ModelSource, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("only one text")
    with pytest.raises(UserError, match="at least two documents"):
        collect_hidden_states(model, tmp_path / "one.txt", progress=False)


def test_plan_spreads_over_sources_documents_and_positions() -> None:
    documents = [Document(s, f"{s}{i}", f"{s}{i}") for s in ("x", "y") for i in range(8)]
    documents += [Document("code", f"code{i}", f"code{i}") for i in range(8)]
    token_ids = [list(range(400)) for _ in documents]
    plan = plan_passages(documents, token_ids, max_tokens=1400, max_context=512, oversampling=2.0)
    kept: dict[tuple[str, str], int] = defaultdict(int)
    for passage in plan:
        kept[passage.source, passage.part] += len(passage.positions)
        assert passage.positions == sorted(set(passage.positions))
        if passage.positions:
            assert passage.positions[0] >= 1
            assert passage.positions[-1] < len(passage.token_ids)
    assert kept["x", "test"] == kept["y", "test"] == 116
    assert kept["x", "calibration"] == 84
    assert kept["code", "test"] == 580
    assert len({p.document for p in plan if p.source == "code"}) == 8
    gaps = [b - a for p in plan for a, b in zip(p.positions, p.positions[1:], strict=False)]
    assert 1.8 < sum(gaps) / len(gaps) < 3, "about every second position"


def test_split_does_not_depend_on_the_order_of_documents() -> None:
    documents = [Document(s, str(i), f"text {i}") for s in ("a", "b") for i in range(7)]
    forward = dict(zip(documents, split_by_document(documents), strict=True))
    turned = documents[4:] + documents[:4]
    turned_parts = dict(zip(turned, split_by_document(turned), strict=True))
    assert forward == turned_parts
    assert sorted(forward.values()).count("test") == 6


def test_texts_from_folders_and_lines(tmp_path: Path) -> None:
    (tmp_path / "fr").mkdir()
    (tmp_path / "fr" / "a.txt").write_text("bonjour")
    (tmp_path / "b.jsonl").write_text('{"text": "hello"}\n\n{"text": "hi", "source": "en"}\n')
    (tmp_path / "ignored.bin").write_bytes(b"\xff")
    found = {(d.source, d.text) for d in read_texts(tmp_path)}
    assert found == {("fr", "bonjour"), ("b", "hello"), ("en", "hi")}


@pytest.mark.parametrize("line", ["no json", '{"no": "text"}', '{"text": 3}', '"text"'])
def test_malformed_line_is_refused_by_number(tmp_path: Path, line: str) -> None:
    (tmp_path / "b.jsonl").write_text('{"text": "hello"}\n' + line + "\n")
    with pytest.raises(UserError, match=r"Line 2 of .*b\.jsonl"):
        read_texts(tmp_path / "b.jsonl")


def test_missing_and_empty_texts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="do not exist"):
        read_texts(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no text"):
        read_texts(tmp_path)


def test_corpus_covers_languages_scripts_mathematics_and_code() -> None:
    scripts: dict[str, set[str]] = defaultdict(set)
    for path in CORPUS.glob("*/*.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines():
            item = json.loads(line)
            scripts[item["script"]].add(item["source"])
    languages = set().union(*scripts.values()) - {"mathematics"}
    assert len(scripts) >= 10
    assert len(languages) >= 20
    counts: dict[str, int] = defaultdict(int)
    for document in shipped_texts():
        counts[document.source] += 1
    assert set(counts) == languages | {"mathematics", "code"}
    assert min(counts.values()) >= 4
    assert sum(p.stat().st_size for p in CORPUS.rglob("*") if p.is_file()) < 1_500_000
    assert len({d.name for d in shipped_texts()}) == sum(counts.values())


def test_foreign_texts_ship_with_their_licence() -> None:
    own = {"code", "passages"}
    folders = {p.parent for p in CORPUS.glob("*/*.*") if p.suffix in (".jsonl", ".txt")}
    assert {f.name for f in folders} >= own
    for folder in folders:
        assert folder.name in (CORPUS / "README.md").read_text()
        assert folder.name in own or list(folder.glob("LICENSE*")), folder.name


@pytest.mark.real
def test_default_states_are_enough_for_every_source() -> None:
    model = open_model()
    calibration, test = collect_hidden_states(model)
    assert len(calibration) >= 9_000
    assert len(test) >= 12_000
    assert min(test.counts().values()) >= 200
    assert len(test.counts()) >= 22
    require_hidden_size(test, 640, model.name)
