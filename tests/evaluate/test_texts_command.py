"""launch/evaluate.py texts: records, going on after an end, and what it prints."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from flashhead_dist.evaluate.texts import TextDecoder
from flashhead_dist.models import open_model
from tests.integrations.transformers_models import make_index

if TYPE_CHECKING:
    from tests.integrations.transformers_zoo import Pair, Zoo

LAUNCH = Path(__file__).parents[2] / "launch"


class _Letters:
    pad_token_id = 0

    def __call__(self, text: str) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[2, *(3 + ord(letter) for letter in text)])


@pytest.fixture(scope="module")
def pair(zoo: Zoo) -> Pair:
    return zoo.pair("llama")


@pytest.fixture(scope="module")
def weak_index(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that probes a cluster a group, so that its texts part soon."""
    return make_index(pair.dense, tmp_path_factory.mktemp("weak"), num_probes=4)


@pytest.fixture
def launch(pair: Pair, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ModuleType]:
    """The command over a small model that has a tokenizer, with a cache of its own."""
    monkeypatch.syspath_prepend(str(LAUNCH))
    monkeypatch.setenv("FLASHHEAD_CACHE", str(tmp_path / "cache"))
    command = importlib.import_module("evaluate")
    texts = importlib.import_module("evaluate_texts")
    opened = open_model(str(pair.folder / "model"))
    model = replace(opened, body_loader=lambda dtype: (pair.dense.to(dtype), _Letters()))
    monkeypatch.setattr(texts, "open_model", lambda name: model)
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


def test_heads_are_compared_and_their_real_texts_agree_with_the_records(
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


def test_a_run_that_was_ended_goes_on_where_it_was(
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


def test_mistakes_are_one_sentence(
    launch: ModuleType, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    cases = {
        "'nosuch'": ["texts", "--heads", "nosuch"],
        "nowhere holds no index": ["texts", "--heads", "flashhead@nowhere"],
        "'many' in flashhead:many": ["texts", "--heads", "flashhead:many"],
        "num_probes 999": [*arguments, "--heads", arguments[8].replace("@", ":999@")],
        "--num-prompts 0": [*arguments, "--num-prompts", "0"],
        "--batch-size 0": [*arguments, "--batch-size", "0"],
        "prompt 1 has 3 tokens": [*arguments, "--max-new-tokens", "126"],
    }
    for value, given in cases.items():
        assert launch.main(given) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.splitlines()[-1].startswith("error: ")
        assert value in captured.err
        assert "Traceback" not in captured.err
