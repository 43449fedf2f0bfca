"""Prompts from anywhere, what is compared and how it is counted."""

from __future__ import annotations

import io
import math
from pathlib import Path

import pytest

from flashhead_dist.decode.compare import Request, identical_share, middle, p90
from flashhead_dist.decode.engine import Layout, Variant
from flashhead_dist.decode.prompts import builtin_prompts, read_prompts
from flashhead_dist.errors import UserError


def test_the_builtin_prompts_are_twenty_of_three_kinds_and_five_languages() -> None:
    prompts = builtin_prompts()
    assert len(set(prompts)) == len(prompts) == 20
    assert sum(prompt.endswith("\nAnswer:") for prompt in prompts) == 5
    scripts = {"Devanagari": "\u0900-\u097f", "Kana": "\u3040-\u30ff", "Cyrillic": "\u0400-\u04ff"}
    for name, span in scripts.items():
        first, last = span.split("-")
        written = [p for p in prompts if any(first <= letter <= last for letter in p)]
        assert len(written) == 2, name
    assert max(map(len, prompts[10:])) <= 80


def test_lines_and_json_lines_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = tmp_path / "some.txt"
    lines.write_text("one\n\n  \ntwo words\n")
    assert read_prompts(lines) == ["one", "two words"]
    objects = tmp_path / "some.jsonl"
    objects.write_text(
        '{"prompt": "a\\nb"}\n{"text": "c"}\n\n{"question": "d"}\n{"turns": ["e", "f"]}\n'
    )
    assert read_prompts(objects) == ["a\nb", "c", "d", "e"]
    monkeypatch.setattr("sys.stdin", io.StringIO("from a pipe\n"))
    assert read_prompts(Path("-")) == ["from a pipe"]


@pytest.mark.parametrize("line", ['{"other": "x"}', '{"prompt": 5}', "[", '{"turns": []}', "5"])
def test_a_line_that_is_no_prompt_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "some.jsonl"
    path.write_text(f'{{"prompt": "fine"}}\n{line}\n')
    with pytest.raises(UserError, match=r"line 2 of .*some\.jsonl"):
        read_prompts(path)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "some.txt"
    path.write_text("\n\n")
    with pytest.raises(UserError, match="holds no prompt"):
        read_prompts(path)


def test_tokens_are_identical_where_they_stand_in_the_same_place() -> None:
    truth = [[1, 2, 3, 4], [5, 6]]
    assert identical_share(truth, truth) == 1
    assert identical_share([[1, 2, 9, 4], [5]], truth) == 4 / 6
    # One token more at the start: every later one is out of place.
    assert identical_share([[0, 1, 2, 3], [5, 6]], truth) == 2 / 6
    assert math.isnan(identical_share([], []))


def test_medians_and_percentiles() -> None:
    assert middle([3.0, 1.0, 2.0]) == 2
    assert p90([float(i) for i in range(11)]) == 9
    assert p90([4.0]) == 4
    assert math.isnan(p90([]))


def test_layouts_and_labels() -> None:
    assert list(Layout(2, 3).head_ranks) == [3, 4, 5]
    Layout(2, 3).check(6)
    with pytest.raises(UserError, match="needs 6 ranks, but 4 started"):
        Layout(2, 3).check(4)
    assert Variant("flashhead", 16).label == "flashhead --lossless 16"


def test_a_prompt_that_does_not_fit_the_model_is_refused() -> None:
    request = Request(prompts=[[1, 2], [3] * 8], max_new_tokens=4)
    request.check(100, 12)
    request.check(100, None)
    with pytest.raises(UserError, match="prompt 2 has 8 tokens and 4 new ones"):
        request.check(100, 11)
    with pytest.raises(UserError, match="prompt 2 holds token 3"):
        request.check(3, None)
