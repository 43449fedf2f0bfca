"""GSM8K: grade-school mathematics in words (Cobbe et al., arXiv 2110.14168).

Eight worked examples of Wei et al. (arXiv 2201.11903, table 20); exact match of the final number.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from typing import Any, ClassVar

from flashhead_dist.evaluate.tasks.task import Item, Judgement, Task, shots

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")
_STATED = re.compile(r"[Tt]he answer is[^\d.-]*(-?[\d.][\d,]*(?:\.\d+)?)")


class Gsm8k(Task):
    """A line: `question`, and `answer` that ends in `#### <number>`."""

    name: ClassVar[str] = "gsm8k"
    title: ClassVar[str] = "GSM8K"
    folder: ClassVar[str] = "gsm8k"
    stops: ClassVar[tuple[str, ...]] = ("\nQ:", "\n\n")
    num_shots: ClassVar[int] = 8

    def read(self, line: dict[str, Any], number: int) -> Item:
        truth = normal_number(line["answer"].rpartition("####")[2])
        if truth is None:
            raise ValueError("`answer` does not end in #### and a number")
        return Item(self.name, str(number), (line["question"],), truth)

    def prompt(self, item: Item, answers: Sequence[str]) -> str:
        return f"{shots(self.name)}Q: {item.turns[0]}\nA:"

    def judge(self, item: Item, answers: Sequence[str]) -> Judgement:
        final = final_number(answers[0])
        return Judgement(final, final == item.truth)


def final_number(text: str) -> str | None:
    """The first number after "the answer is", else the last of the text; None where none is."""
    stated = _STATED.search(text)
    if stated is not None:
        return normal_number(stated[1])
    found = _NUMBER.findall(text)
    return normal_number(found[-1]) if found else None


def normal_number(text: str) -> str | None:
    """`text` without thousands separators, currency, and zeros that say nothing; None: no number.

    1,200.50 is 1200.5 and 18.00 is 18.
    """
    try:
        value = Decimal(text.strip().strip("$").replace(",", "").rstrip("."))
    except InvalidOperation:
        return None
    return format(value.normalize() + 0, "f") if value.is_finite() else None
