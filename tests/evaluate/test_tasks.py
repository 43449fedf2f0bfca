"""Tasks: how items are read, asked and judged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flashhead_dist.errors import UserError
from flashhead_dist.evaluate.tasks import TASK_NAMES, Item, Task, find_tasks
from flashhead_dist.evaluate.tasks.base import read_items
from flashhead_dist.evaluate.tasks.questions import (
    final_number,
    last_boxed,
    normal_number,
    stated_letter,
)
from flashhead_dist.states.split import shipped_texts

LINES: dict[str, dict[str, Any]] = {
    "gsm8k": {"question": "How many?", "answer": "Two and one.\n#### 1,003"},
    "math500": {"problem": "What is $x$?", "answer": "\\frac{1}{2}", "unique_id": "a/1.json"},
    "mmlu_pro": {"question": "Which?", "options": ["this", "that", "it"], "answer": "B"},
    "ifeval": {
        "key": 5,
        "prompt": "Say it without a comma.",
        "instruction_id_list": ["punctuation:no_comma"],
        "kwargs": [{}],
    },
    "mt_bench": {"turns": ["Say it.", "Again."]},
}


def task_named(name: str) -> Task:
    return find_tasks(name)[0]


def item_of(name: str, **changes: Any) -> Item:
    return task_named(name).read(LINES[name] | changes, 0)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("5 + 4 = 9. The answer is 9.", "9"),
        ("The answer is $1,200.50.\nThe answer is 7.", "1200.5"),
        ("So he has 3 apples and 18.00 pears", "18"),
        ("It falls to -5 degrees", "-5"),
        ("The answer is 007", "7"),
        ("There is .50 of it", "0.5"),
        ("The answer is unknown", None),
        ("", None),
    ],
)
def test_the_final_number_is_the_stated_one_or_the_last(text: str, number: str | None) -> None:
    assert final_number(text) == number


def test_large_and_small_numbers_are_not_written_with_exponents() -> None:
    assert normal_number("70,000") == "70000"
    assert normal_number("0.00000001") == "0.00000001"
    assert normal_number("-0") == "0"
    assert normal_number("nan") is None


@pytest.mark.parametrize(
    ("text", "boxed"),
    [
        (r"so $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        (r"$\boxed{3}$, no, $\boxed{\text{(C)}}$", r"\text{(C)}"),
        (r"$\fbox{5}$", "5"),
        (r"$\boxed 7$", "7"),
        (r"$\boxed{\frac{1}{2}$ is not closed", None),
        (r"\boxed{}", None),
        ("none", None),
    ],
)
def test_the_last_box_is_taken_with_all_its_braces(text: str, boxed: str | None) -> None:
    assert last_boxed(text) == boxed


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("The answer is (D).", "D"),
        ("so the answer is B", "B"),
        ("Answer: (J)", "J"),
        ("The answer is (K).", None),
        ("The answer is Because", None),
        ("A is not it", None),
    ],
)
def test_a_letter_counts_where_it_is_stated(text: str, letter: str | None) -> None:
    assert stated_letter(text) == letter


def test_mathematics_is_compared_by_value_and_not_by_spelling() -> None:
    math500 = task_named("math500")
    item = item_of("math500")
    assert math500.judge(item, [r"It is $\boxed{0.5}$."]).correct
    assert math500.judge(item, [r"It is $\boxed{\dfrac{2}{4}}$."]).correct
    assert not math500.judge(item, [r"It is $\boxed{2}$."]).correct
    # A value outside a box is no answer.
    assert not math500.judge(item, ["It is 1/2."]).correct
    assert math500.same_final("(3, \\pi/2)", "\\left( 3, \\frac{\\pi}{2} \\right)")
    assert not math500.same_final(None, None)


def test_judgements_of_numbers_and_letters() -> None:
    gsm8k, mmlu_pro = task_named("gsm8k"), task_named("mmlu_pro")
    assert gsm8k.judge(item_of("gsm8k"), ["The answer is 1003."]).correct
    assert not gsm8k.judge(item_of("gsm8k"), ["The answer is 3."]).correct
    assert mmlu_pro.judge(item_of("mmlu_pro"), ["The answer is (B)."]).correct
    assert task_named("mt_bench").judge(item_of("mt_bench"), ["a", "b"]).correct is None


def test_rules_of_ifeval() -> None:
    pytest.importorskip("lm_eval", reason="needs lm-eval: make test-lm-eval")
    ifeval = task_named("ifeval")
    item = item_of("ifeval")
    assert ifeval.judge(item, ["It"]).correct
    found = ifeval.judge(item, ["First, it"])
    assert (found.final, found.correct, found.details) == ("0", False, {"loose": False})
    # The loose rules leave the first line out.
    assert ifeval.judge(item, ["Sure, here:\nit"]).details["loose"]
    with pytest.raises(UserError, match="item 5 asks for no:rule"):
        ifeval.judge(item_of("ifeval", instruction_id_list=["no:rule"]), ["It"])


def test_equal_answers_meet_the_same_rule() -> None:
    """IFEval asks for exclamation marks; the rule wants a letter, and draws one in their place."""
    pytest.importorskip("lm_eval", reason="needs lm-eval: make test-lm-eval")
    kwargs = [{"letter": "!", "let_frequency": 2, "let_relation": "at least"}]
    item = item_of("ifeval", instruction_id_list=["keywords:letter_frequency"], kwargs=kwargs)
    judged = [task_named("ifeval").judge(item, ["see the tests"]) for _ in range(40)]
    assert all(one == judged[0] for one in judged)


@pytest.mark.parametrize("name", TASK_NAMES)
def test_prompts_end_where_the_model_goes_on_and_hold_no_answer(name: str) -> None:
    task, item = task_named(name), item_of(name)
    prompt = task.prompt(item, [])
    assert item.turns[0] in prompt
    assert prompt == prompt.rstrip()
    marks = {"gsm8k": "Q: ", "math500": "Problem: ", "mmlu_pro": "Question: "}
    if name in marks:
        assert prompt.count(marks[name]) == task.num_shots + 1
        # An answer that goes on to a question of its own ends there.
        assert task.cut(f"so 3.\n{marks[name]}What?") == "so 3."
    shots = prompt.removesuffix(item.turns[0])
    assert str(item.truth) not in shots or name == "mmlu_pro"


def test_a_worked_example_is_judged_right() -> None:
    """What stands before a question shows the form that the judge looks for."""
    for name, mark in (("gsm8k", "A:"), ("math500", "Solution:"), ("mmlu_pro", "Answer:")):
        task = task_named(name)
        examples = task.prompt(item_of(name), []).split("\n\n")[: task.num_shots]
        finals = [task.judge(item_of(name), [one.partition(mark)[2]]).final for one in examples]
        assert None not in finals
        assert len(set(finals)) > 1


def write(folder: Path, lines: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True)
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (folder / "test.jsonl").write_text(text, encoding="utf-8")


def test_the_first_items_are_a_sample_and_stay_the_first(tmp_path: Path) -> None:
    """Fails for items in the file's order, which data sets sort by subject."""
    # A character that str.splitlines takes for the end of a line.
    lines = [{"question": f"Question\u2028{i} of ours?", "answer": "#### 1"} for i in range(200)]
    write(tmp_path / "gsm8k", lines)
    items, left_out = read_items(task_named("gsm8k"), tmp_path)
    assert left_out == 0
    assert sorted(int(item.id) for item in items) == list(range(200))
    assert 60 < sum(int(item.id) for item in items[:50]) / 50 < 140
    assert read_items(task_named("gsm8k"), tmp_path)[0] == items


def test_items_of_the_shipped_corpus_are_left_out(tmp_path: Path) -> None:
    shipped = next(d.text for d in shipped_texts() if d.name.startswith("gsm8k-"))
    question = shipped.removeprefix("Question: ").partition("\nAnswer:")[0]
    new = {"question": "A question of ours?", "answer": "#### 2"}
    write(tmp_path / "gsm8k", [{"question": question.replace(" ", "  "), "answer": "#### 1"}, new])
    items, left_out = read_items(task_named("gsm8k"), tmp_path)
    assert [item.turns for item in items] == [("A question of ours?",)]
    assert left_out == 1


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("gsm8k", {"question": "No number?", "answer": "none"}),
        ("math500", {"problem": "No answer?"}),
        ("mmlu_pro", LINES["mmlu_pro"] | {"answer": "D"}),
        ("ifeval", LINES["ifeval"] | {"kwargs": []}),
        ("mt_bench", {"turns": ["Only one."]}),
    ],
)
def test_a_line_of_another_kind_is_named(tmp_path: Path, name: str, line: dict[str, Any]) -> None:
    write(tmp_path / name, [LINES[name], line])
    with pytest.raises(UserError, match=rf"line 2 of .*test.jsonl is no item of {name}"):
        read_items(task_named(name), tmp_path)
