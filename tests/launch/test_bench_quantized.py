"""bench_quantized on a small model: a document that holds, and mistakes in one sentence."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from flashhead_dist.models import open_model
from tests.launch.ground import LAUNCH, build_small
from tests.launch.scripts import load_script
from tests.launch.small_llama import save_small_llama

pytest.importorskip("compressed_tensors")


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(LAUNCH))
        yield load_script("bench_quantized")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small Llama and an index that probes everything."""
    monkeypatch.setenv("FLASHHEAD_CACHE", str(tmp_path / "cache"))
    save_small_llama(tmp_path / "model", context=96)
    build_small(open_model(str(tmp_path / "model")), tmp_path / "index", 4, num_probes=68)
    (tmp_path / "prompts.txt").write_text("Once upon\nabc\n")
    return tmp_path


def test_four_texts_are_timed_and_compared_within_a_body(
    script: ModuleType, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", str(place / "model"), "--index", str(place / "index"), "--json"]
    arguments += ["--prompts", str(place / "prompts.txt"), "--max-new-tokens", "8"]
    assert script.main(arguments) == 0
    out = capsys.readouterr().out
    found = json.loads(out.splitlines()[-1])
    times = found["tpot_ms"]
    assert set(times) == {"own", "w4a16"}
    assert found["identical_tokens_share"] == {"own": 1, "w4a16": 1}
    for body, by_head in times.items():
        assert found["head_gain"][body] == by_head["dense_local_max"] / by_head["flashhead"]
    assert found["gain"] == times["own"]["dense_local_max"] / times["w4a16"]["flashhead"]
    # The copy was made once, where the output names it, and is what ran.
    (copy,) = (place / "cache" / "models").glob("[!.]*")
    assert str(copy) in out.replace("\n", "")
    stored = json.loads((copy / "config.json").read_text())["quantization_config"]
    assert stored["config_groups"]["group_0"]["weights"]["num_bits"] == 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--threads", "0"), "--threads is 0"),
        (("--max-new-tokens", "1"), "--max-new-tokens is 1"),
        (("--group-size", "48"), "groups of 48 columns do not divide a layer of 64"),
        (("--quantized", "nowhere/at/all"), "does not exist"),
    ],
)
def test_mistakes_are_told_in_one_sentence(
    script: ModuleType,
    place: Path,
    arguments: tuple[str, ...],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    named = ["--model", str(place / "model"), "--index", str(place / "index")]
    assert script.main([*named, *arguments]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    assert words in said[0]
