"""bench_transformers on a small model: a document that holds, and mistakes in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

from tests.integrations.transformers_models import make_index, make_model
from tests.launch.scripts import load_script

SCRIPT = Path(__file__).parents[2] / "launch" / "bench_transformers.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("bench_transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with an index that probes everything, and a tokenizer of single letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    place = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLASHHEAD_CACHE", str(place / "cache"))
        make_index(make_model("llama", tied=False), place, num_probes=128)
    letters = {letter: i + 3 for i, letter in enumerate("abcdefghijklmnopqrstuvwxyzT")}
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, **letters}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(place / "model")
    return place


def test_all_ways_are_timed_and_greedy_tokens_compared(
    script: ModuleType,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("FLASHHEAD_CACHE", str(folder / "cache"))
    places = ["--model", str(folder / "model"), "--index", str(folder / "index")]
    assert script.main([*places, "--rounds", "1", "--new-tokens", "4", "--json"]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    ways = {row["way"]: row for row in document["ways"]}
    assert len(ways) == 7
    for name, row in ways.items():
        assert row["dense_ms"] > 0
        assert row["ratio"] == pytest.approx(row["dense_ms"] / row["flashhead_ms"])
        drawn = name.startswith(("temperature", "top"))
        assert row["identical_tokens_share"] == (None if drawn else 1.0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(("--rounds", "0"), "--rounds is 0"), (("--model", "nowhere/at/all"), "does not exist")],
)
def test_mistakes_are_told_in_one_sentence(
    script: ModuleType,
    arguments: tuple[str, ...],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("FLASHHEAD_CACHE", str(tmp_path))
    assert script.main(arguments) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1
