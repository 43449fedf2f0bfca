"""launch/drafts.py on a small model: what it counts, that texts are equal, and mistakes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from flashhead_dist.decode import drafts
from flashhead_dist.integrations.eagle import DraftCounts, EagleDraft
from flashhead_dist.models import open_model
from tests.launch.ground import LAUNCH, build_small
from tests.launch.scripts import load_script
from tests.launch.small_llama import save_small_llama

HEADS = ["no draft", "dense_local_max", "flashhead"]
REDUCED = ["dense_local_max, 40 tokens", "flashhead, 40 tokens"]


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(LAUNCH))
        yield load_script("drafts")


@pytest.fixture
def named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Options that name a small Llama and an index that probes everything."""
    monkeypatch.setenv("FLASHHEAD_CACHE", str(tmp_path / "cache"))
    # Few texts: the corpus as bytes is long.
    monkeypatch.setattr(drafts, "shipped_texts", lambda: FEW)
    monkeypatch.setattr(drafts, "default_states", lambda *_: (None, None))
    save_small_llama(tmp_path / "model", context=512)
    index = build_small(open_model(str(tmp_path / "model")), tmp_path / "index", 4, num_probes=68)
    few = ["--num-prompts", "2", "--max-new-tokens", "8", "--epochs", "1", "--json"]
    return ["--model", str(tmp_path / "model"), "--index", str(index), *few]


FEW = drafts.shipped_texts()[:6]


def test_every_head_is_counted_and_every_text_is_the_same(
    script: ModuleType, named: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main([*named, "--vocabularies", "40", "--num-drafts", "2"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["heads"]
    rows = {row["head"]: row for row in found}
    assert list(rows) == HEADS + REDUCED
    for row in found:
        assert row["identical_tokens_share"] == 1
        assert row["ms_per_token"] > 0
    plain = rows.pop("no draft")
    assert (plain["acceptance"], plain["tokens_per_pass"]) == (None, 1)
    for row in rows.values():
        assert 0 <= row["acceptance"] <= 1
        assert row["draft_ms"] >= row["draft_head_ms"] > 0
        assert len(row["acceptance_by_source"]) == 2
    # An index that probes everything proposes what the dense head does, at other cost.
    for dense, retrieval in (HEADS[1:], REDUCED):
        for name in ("acceptance", "accepted_at", "proposed_at", "tokens_per_pass"):
            assert rows[dense][name] == rows[retrieval][name]
    assert rows[REDUCED[0]]["head_bytes"] * 263 == rows["dense_local_max"]["head_bytes"] * 40
    # The draft was trained once.
    (kept,) = (tmp_path / "cache" / "drafts").glob("[!.]*")
    before = (kept / "draft.safetensors").stat().st_mtime_ns
    assert script.main([*named, "--vocabularies", "40"]) == 0
    assert (kept / "draft.safetensors").stat().st_mtime_ns == before


def test_counts_add_up() -> None:
    counts, other = DraftCounts(), DraftCounts()
    for accepted in (3, 0, 1):
        counts.count(3, accepted)
    other.count(1, 1)
    counts.add(other)
    assert counts.proposed_at == [4, 3, 3]
    assert counts.accepted_at == [3, 1, 1]
    assert counts.acceptance == 5 / 10


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--num-drafts", "0"), "--num-drafts is 0"),
        (("--num-prompts", "100000"), "100000 prompts are more than"),
        (("--vocabularies", "264"), "a draft vocabulary of 264 tokens"),
        (("--draft", "nowhere"), "nowhere holds no readable draft model"),
    ],
)
def test_mistakes_are_told_in_one_sentence(
    script: ModuleType,
    named: list[str],
    tmp_path: Path,
    arguments: tuple[str, ...],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if "--draft" not in arguments:
        source = open_model(str(tmp_path / "model"))
        draft = EagleDraft(source.load_body()[0].config)
        draft.save(tmp_path / "draft", {"model": "small", "weight_hash": source.weight_hash})
        arguments = (*arguments, "--draft", str(tmp_path / "draft"))
    assert script.main([*named, *arguments]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    assert words in said[0]
