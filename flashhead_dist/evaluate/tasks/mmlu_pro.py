"""MMLU-Pro: multiple choice of up to ten answers (Wang et al., arXiv 2406.01574).

Chain of thought after three worked examples; the letter of "the answer is (X)".
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from string import ascii_uppercase
from typing import Any, ClassVar

from flashhead_dist.evaluate.tasks.task import Item, Judgement, Task, shots

# As the authors' own evaluate_from_local.py looks for it, without its last resort of any letter.
_STATED = (
    re.compile(r"answer is:?\s*\(?([A-J])\b\)?"),
    re.compile(r"[aA]nswer:\s*\(?([A-J])\b"),
)


class MmluPro(Task):
    """A line: `question`, `options` (a list), `answer` (a letter) and `question_id`."""

    name: ClassVar[str] = "mmlu_pro"
    title: ClassVar[str] = "MMLU-Pro"
    folder: ClassVar[str] = "mmlu_pro"
    stops: ClassVar[tuple[str, ...]] = ("\nQuestion:", "\n\n")
    num_shots: ClassVar[int] = 3

    def read(self, line: dict[str, Any], number: int) -> Item:
        options, answer = list(line["options"]), line["answer"]
        letters = ascii_uppercase[: len(options)]
        if not 2 <= len(options) <= 10 or len(answer) != 1 or answer not in letters:
            raise ValueError("`options` are not 2 to 10, or `answer` is none of their letters")
        listed = [f"({letter}) {text}" for letter, text in zip(letters, options, strict=True)]
        asked = "\n".join([f"Question: {line['question']}", "Options:", *listed])
        return Item(self.name, str(line.get("question_id", number)), (asked,), answer)

    def prompt(self, item: Item, answers: Sequence[str]) -> str:
        return f"{shots(self.name)}{item.turns[0]}\nAnswer: Let's think step by step."

    def judge(self, item: Item, answers: Sequence[str]) -> Judgement:
        final = stated_letter(answers[0])
        return Judgement(final, final == item.truth)


def stated_letter(text: str) -> str | None:
    """The letter that `text` states as its answer; None where it states none."""
    for pattern in _STATED:
        found = pattern.search(text)
        if found is not None:
            return found[1]
    return None
