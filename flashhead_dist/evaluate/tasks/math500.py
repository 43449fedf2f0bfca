r"""MATH-500: competition mathematics (Hendrycks et al., arXiv 2103.03874; the 500 problems of
Lightman et al., arXiv 2305.20050).

Four worked examples; the last \boxed answer, the same as the truth for math-verify, which parses
both into sympy (https://github.com/huggingface/Math-Verify).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, ClassVar

from flashhead_dist.errors import UserError
from flashhead_dist.evaluate.tasks.task import Item, Judgement, Task, shots

_BOXED = ("\\boxed", "\\fbox")


class Math500(Task):
    """A line: `problem` and `answer`, in LaTeX; `unique_id` where there is one."""

    name: ClassVar[str] = "math500"
    title: ClassVar[str] = "MATH-500"
    folder: ClassVar[str] = "math500"
    stops: ClassVar[tuple[str, ...]] = ("\nProblem:", "\n\n\n")
    num_shots: ClassVar[int] = 4

    def read(self, line: dict[str, Any], number: int) -> Item:
        identity = str(line.get("unique_id", number))
        return Item(self.name, identity, (line["problem"],), str(line["answer"]))

    def prompt(self, item: Item, answers: Sequence[str]) -> str:
        return f"{shots(self.name)}Problem: {item.turns[0]}\nSolution:"

    def judge(self, item: Item, answers: Sequence[str]) -> Judgement:
        final = last_boxed(answers[0])
        return Judgement(final, self.same_final(item.truth, final))

    def same_final(self, left: str | None, right: str | None) -> bool:
        if left is None or right is None:
            return False
        return left == right or _equal(left, right)

    def require(self) -> None:
        try:
            import math_verify  # noqa: F401
        except ImportError as error:
            raise UserError(
                "math500 compares answers with math-verify, which is not installed: "
                "pip install 'flashhead-dist[evaluate]', or leave math500 out of --tasks"
            ) from error


def last_boxed(text: str) -> str | None:
    r"""What stands in the last \boxed{...} of `text`; None without one that is closed."""
    start = max(text.rfind(name) for name in _BOXED)
    if start < 0:
        return None
    opened = text.find("{", start)
    # "\boxed 5" has no braces: the answer is the next word.
    if opened < 0 or text[start:opened].strip() not in _BOXED:
        rest = text[start:].split(maxsplit=2)
        return rest[1].rstrip("$.") if len(rest) > 1 else None
    depth = 0
    for place in range(opened, len(text)):
        depth += (text[place] == "{") - (text[place] == "}")
        if depth == 0:
            return text[opened + 1 : place].strip() or None
    return None


@cache
def _equal(truth: str, answer: str) -> bool:
    from math_verify import parse, verify

    # It is written in the order (gold, answer) and not symmetric: an interval, say, may be a tuple.
    return bool(verify(parse(f"${truth}$"), parse(f"${answer}$")))
