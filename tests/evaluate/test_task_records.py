"""Records of tasks: what survives an end, and the figures made of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from flashhead_dist.decode.answers import first_difference
from flashhead_dist.errors import UserError
from flashhead_dist.evaluate.tasks import find_tasks
from flashhead_dist.evaluate.tasks.records import RECORDS_NAME, TaskRun, summarise

DENSE, HEAD = "dense_local_max", "flashhead"


def answer(final: str | None, correct: bool | None, differs: int | None, **more: Any) -> Any:
    times = {"batch_tokens": 100, "batch_s": 2.0, "num_tokens": 10}
    own = {"texts": ["x"], "final": final, "correct": correct, "first_difference": differs}
    return times | own | more


def record(item: str, dense: Any, own: Any, batch: str = "b", task: str = "gsm8k") -> Any:
    return {"task": task, "item": item, "batch": batch, "answers": {DENSE: dense, HEAD: own}}


def test_a_record_that_was_cut_short_is_dropped_and_the_rest_kept(tmp_path: Path) -> None:
    run = TaskRun(tmp_path / "run", {"model": "m"}, {})
    # A character that str.splitlines takes for the end of a line.
    kept = record("1", answer("1", True, None, texts=["a\u2028b"]), answer("1", True, None))
    run.append([kept])
    path = tmp_path / "run" / RECORDS_NAME
    with path.open("a") as file:
        file.write(json.dumps(record("2", answer("1", True, None), answer("1", True, None)))[:40])
    again = TaskRun(tmp_path / "run", {"model": "m"}, {})
    assert again.records == [kept]
    assert again.finished == {("gsm8k", "1")}
    later = record("2", answer("1", True, None), answer("2", False, 3))
    again.append([later])
    assert TaskRun(tmp_path / "run", {"model": "m"}, {}).records == [kept, later]


def test_records_of_other_settings_are_refused(tmp_path: Path) -> None:
    TaskRun(tmp_path, {"model": "m", "heads": ("a",)}, {})
    # Nothing is kept yet that could be mixed.
    run = TaskRun(tmp_path, {"model": "n", "heads": ("a",)}, {})
    run.append([record("1", answer("1", True, None), answer("1", True, None))])
    TaskRun(tmp_path, {"model": "n", "heads": ("a",)}, {"began": "later"})
    with pytest.raises(UserError, match="made with model 'n', not 'm': name another folder"):
        TaskRun(tmp_path, {"model": "m", "heads": ("a",)}, {})


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    (tmp_path / RECORDS_NAME).write_text('{"task": "gsm8k"}\n')
    with pytest.raises(UserError, match=r"line 1 of .*records.jsonl is no record"):
        TaskRun(tmp_path, {}, {})


def test_figures_of_a_task() -> None:
    records = [
        record("1", answer("1", True, None), answer("1", True, None), "first"),
        record("2", answer("2", True, None), answer("3", False, 4), "first"),
        # Neither gave a final answer: they do not agree on one.
        record("3", answer(None, False, None), answer(None, False, 8), "first"),
        record("4", answer("4", False, None), answer(None, False, 30), "second"),
    ]
    records[3]["answers"][HEAD] |= {"batch_tokens": 300, "batch_s": 2.0}
    (row,) = summarise(records, find_tasks("gsm8k,ifeval"), DENSE).to_dict("records")
    assert (row["task"], row["head"], row["items"], row["scored"]) == ("gsm8k", HEAD, 4, 4)
    assert (row["dense_score"], row["score"]) == (0.5, 0.25)
    assert row["score_difference"] == -0.25
    assert row["score_difference_low"] < -0.25 < row["score_difference_high"]
    assert (row["answers_agree"], row["finals"]) == (pytest.approx(1 / 3), 3)
    assert row["identical_texts"] == 0.25
    assert row["first_difference"] == 8
    # A batch counts once, whatever its items: (50 + 150) / 2 tokens a second.
    assert (row["dense_tokens_per_s"], row["tokens_per_s"]) == (50, 100)
    # Wilson's interval of 1 in 4 (Newcombe 1998, method 3).
    assert row["score_low"] == pytest.approx(0.0456, abs=1e-4)
    assert row["score_high"] == pytest.approx(0.6994, abs=1e-4)


def test_items_without_a_score_are_no_failures() -> None:
    records = [
        record("1", answer("1", True, None), answer("1", True, None), task="ifeval"),
        record("2", answer(None, None, None), answer(None, None, 2), task="ifeval"),
    ]
    (row,) = summarise(records, find_tasks("ifeval"), DENSE).to_dict("records")
    assert (row["items"], row["scored"], row["score"]) == (2, 1, 1)
    assert math.isnan(row["score_difference"])


def test_no_change_among_few_items_is_not_a_difference_of_exactly_zero() -> None:
    same = [record(str(i), answer("1", True, None), answer("1", True, None)) for i in range(20)]
    (row,) = summarise(same, find_tasks("gsm8k"), DENSE).to_dict("records")
    assert row["score_difference"] == 0
    # Wilson's upper end for 0 of 20 (Newcombe 1998, method 3).
    assert row["score_difference_high"] == pytest.approx(0.1611, abs=1e-4)


@pytest.mark.parametrize(
    ("left", "right", "place"),
    [([1, 2, 3], [1, 5, 3], 1), ([1, 2], [1, 2, 3], 2), ([4], [5], 0), ([], [1], 0)],
)
def test_the_first_difference(left: list[int], right: list[int], place: int) -> None:
    assert first_difference(left, right) == place
    assert first_difference(right, left) == place
