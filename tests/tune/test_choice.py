"""The front, the choice, the journal: nothing beaten is kept, nothing finished is lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flashhead_dist.errors import UserError
from flashhead_dist.tune.front import choose, curve, parse_target, undominated
from flashhead_dist.tune.run import Journal, frequent_tokens


def record(share: float, top1: float, worst: float, **more: Any) -> dict[str, Any]:
    return {"bytes_share": share, "top1": top1, "top1_worst": worst, **more}


A = record(0.05, 0.98, 0.90, median_us=100.0)
B = record(0.06, 0.97, 0.95, median_us=90.0)
C = record(0.07, 0.99, 0.94, median_us=80.0)
BEATEN = record(0.07, 0.97, 0.95, median_us=70.0)


def test_a_point_stays_that_is_better_in_one_agreement() -> None:
    # Fails where one agreement alone decides.
    assert undominated([BEATEN, C, B, A]) == [A, B, C]


def test_a_curve_only_rises() -> None:
    assert curve([C, B, A], "top1") == [A, C]
    assert curve([C, B, A], "top1_worst") == [A, B]


@pytest.mark.parametrize(
    ("target", "most", "expected"),
    [
        ("worst=0.94", None, B),
        ("worst=0.94,overall=0.98", None, C),
        ("worst=0.94,fastest-within=0.2", None, BEATEN),
        ("worst=0.94,fastest-within=0.01", None, B),
    ],
)
def test_the_choice_serves_its_target(target: str, most: float | None, expected: Any) -> None:
    assert choose([A, B, C, BEATEN], parse_target(target, most)) == expected


def sure(missed: int, alpha: float, share: float = 0.08, columns: int = 256) -> dict[str, Any]:
    half = 1 - missed / 10000
    settings = {"alpha": alpha, "centroid_columns": columns}
    return record(share, 0.99, 0.98, states=10000, top1_half_probes=half, **settings)


@pytest.mark.parametrize(
    ("records", "chosen"),
    [
        # Fewest misses with half of the probes, whatever the few with all of them.
        ([sure(30, 1.0) | {"top1_worst": 1.0}, sure(9, 1.0)], 1),
        # 10 more than 9 are within 1.96 sqrt(28), 11 more are not within 1.96 sqrt(29).
        ([sure(9, 2.0), sure(19, 1.25), sure(20, 1.0)], 1),
        # Of tied ones the alpha nearest to 1, then the most columns.
        ([sure(9, 2.0, columns=320), sure(12, 1.0, columns=192), sure(15, 1.0), sure(40, 1.0)], 2),
        # Then the fewest misses, then the fewest bytes.
        ([sure(12, 1.0), sure(11, 1.0), sure(11, 1.0, 0.07)], 2),
        # What reads too much is not looked at.
        ([sure(9, 1.0, 0.11), sure(20, 1.0)], 1),
    ],
)
def test_within_bytes_the_surest_is_chosen(records: list[dict[str, Any]], chosen: int) -> None:
    assert choose(records, parse_target("", 0.10)) is records[chosen]


def test_a_target_out_of_reach_says_what_is() -> None:
    with pytest.raises(UserError, match=r"99 % in the worst source .*95\.00 % in the worst"):
        choose([A, B], parse_target("worst=0.99", None))


@pytest.mark.parametrize("text", ["wurst=0.9", "worst=9", "worst"])
def test_a_target_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="not understood"):
        parse_target(text, None)


def test_a_journal_goes_on_where_it_was_cut(tmp_path: Path) -> None:
    # The likely bug: a torn last line is read, or the next entry is written onto its end.
    path = tmp_path / "journal.jsonl"
    journal = Journal(path, {"of": 1})
    journal.add("a", {"x": 1.5})
    with path.open("a") as file:
        file.write('["b", {"x"')
    again = Journal(path, {"of": 1})
    assert "a" in again
    assert "b" not in again
    again.add("b", 2)
    assert Journal(path, {"of": 1})["b"] == 2
    assert [json.loads(line)[0] for line in path.read_text().splitlines()] == ["inputs", "a", "b"]


def test_a_journal_of_other_inputs_is_refused(tmp_path: Path) -> None:
    Journal(tmp_path / "journal.jsonl", {"of": 1})
    with pytest.raises(UserError, match="other states, weights or options"):
        Journal(tmp_path / "journal.jsonl", {"of": 2})


def test_a_damaged_journal_is_named(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text("nonsense\n")
    with pytest.raises(UserError, match=r"journal\.jsonl is damaged"):
        Journal(path, {})


class _Backend:
    def to_str(self) -> str:
        return json.dumps({"model": {"merges": [["t", "h"], "a n", ["th", "e"]]}})


class _Tokenizer:
    all_special_ids = (0,)
    backend_tokenizer = _Backend()

    def get_vocab(self) -> dict[str, int]:
        return {"<eos>": 0, "t": 1, "h": 2, "the": 3, "a": 4, "an": 5, "n": 6, "th": 7, "e": 8}


def test_frequent_tokens_come_in_the_order_of_merges() -> None:
    assert frequent_tokens(_Tokenizer(), 5, 9) == [7, 5, 3, 1, 2]
    assert frequent_tokens(_Tokenizer(), 9, 6) == [5, 3, 1, 2, 4]


def test_a_tokenizer_without_merges_gives_ids() -> None:
    tokenizer = _Tokenizer()
    tokenizer.backend_tokenizer = None  # type: ignore[assignment]
    assert frequent_tokens(tokenizer, 3, 9) == [1, 2, 3]
