"""Hidden states: the head's own input, split by document, kept once, refused when unusable."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, Gemma3TextConfig, PreTrainedTokenizerFast

from flashhead_dist.errors import UserError
from flashhead_dist.hidden_states import (
    HiddenStates,
    collect_hidden_states,
    load_hidden_states,
    require_hidden_size,
    save_hidden_states,
)
from flashhead_dist.hidden_states import collect as collect_module
from flashhead_dist.hidden_states.split import plan_passages, split_by_document
from flashhead_dist.hidden_states.texts import Document, read_texts, shipped_texts
from flashhead_dist.model_source import ModelSource, open_model

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


def states_of(n: int = 6, **changes: Any) -> HiddenStates:
    values: dict[str, Any] = {
        "states": torch.arange(float(n * D)).reshape(n, D).to(torch.bfloat16),
        "source_ids": torch.arange(n) % 2,
        "sources": ("a", "b"),
        "origin": "a test",
        "documents": torch.arange(n) // 2,
    }
    return HiddenStates(**(values | changes))


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


def test_file_round_trip(tmp_path: Path) -> None:
    hidden_states = states_of()
    save_hidden_states(tmp_path / "states.safetensors", hidden_states)
    loaded = load_hidden_states(tmp_path / "states.safetensors")
    for name in ("states", "source_ids", "documents"):
        assert torch.equal(getattr(loaded, name), getattr(hidden_states, name))
    assert (loaded.sources, loaded.origin) == (("a", "b"), "a test")
    assert loaded.counts() == {"a": 3, "b": 3}


def test_file_with_the_states_alone_is_one_source(tmp_path: Path) -> None:
    save_file({"hidden_states": torch.randn(3, D)}, tmp_path / "bare.safetensors")
    loaded = load_hidden_states(tmp_path / "bare.safetensors")
    assert loaded.counts() == {"all": 3}
    assert loaded.documents is None
    assert loaded.states.dtype == torch.float32


def test_subset_by_mask_and_by_index() -> None:
    hidden_states = states_of()
    mask = hidden_states.source_ids == 1
    picked = hidden_states.subset(mask)
    assert torch.equal(picked.states, hidden_states.states[[1, 3, 5]])
    assert picked.counts() == {"b": 3}
    again = hidden_states.subset(torch.tensor([5, 0]))
    assert again.source_ids.tolist() == [1, 0]
    assert again.documents is not None
    assert again.documents.tolist() == [2, 0]


def with_nan(path: Path) -> None:
    states = torch.randn(5, D)
    states[3, 7] = float("nan")
    states[4, 0] = float("inf")
    save_file({"hidden_states": states}, path)


def truncated(path: Path) -> None:
    save_hidden_states(path, states_of())
    path.write_bytes(path.read_bytes()[:-3])


def named_too_few(path: Path) -> None:
    tensors = {"hidden_states": torch.randn(2, D), "source": torch.tensor([0, 2])}
    save_file(tensors, path, {"sources": '["a", "b"]'})


REFUSALS: list[tuple[Callable[[Path], object], str]] = [
    (lambda path: None, "do not exist"),
    (lambda path: path.write_text("no tensors"), "no readable safetensors file"),
    (truncated, "no readable safetensors file"),
    (with_nan, "NaN or infinity, first in row 3"),
    (named_too_few, "source 2, but its metadata names 2 sources"),
    (lambda path: save_file({"states": torch.randn(2, D)}, path), "holds no such tensor"),
    (lambda path: save_file({"hidden_states": torch.randn(D)}, path), r"holds torch.float32 \(32,"),
    (lambda path: save_file({"hidden_states": torch.ones(2, D).int()}, path), "torch.int32"),
    (lambda path: save_file({"hidden_states": torch.randn(0, D)}, path), "N >= 1"),
    (
        lambda path: save_file(
            {"hidden_states": torch.randn(2, D), "source": torch.zeros(3).int()}, path
        ),
        "source of .* must hold 2 integers",
    ),
]


@pytest.mark.parametrize(("write", "message"), REFUSALS, ids=[m[:24] for _, m in REFUSALS])
def test_unusable_file_is_refused(
    tmp_path: Path, write: Callable[[Path], object], message: str
) -> None:
    path = tmp_path / "states.safetensors"
    write(path)
    with pytest.raises(UserError, match=message):
        load_hidden_states(path)


def test_states_of_another_size_are_refused() -> None:
    require_hidden_size(states_of(), D, "this model")
    with pytest.raises(UserError, match=f"size {D}, but this model has hidden size 640"):
        require_hidden_size(states_of(), 640, "this model")


def test_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "full").symlink_to("/dev/full")
    with pytest.raises(UserError, match="cannot be written"):
        save_hidden_states(tmp_path / "full" / "states.safetensors", states_of())


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
