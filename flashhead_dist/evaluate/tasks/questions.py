"""GSM8K, MATH-500, MMLU-Pro, IFEval and MT-Bench; docs/guides/evaluation.md describes each."""

from __future__ import annotations

import contextlib
import random
import re
import sys
from collections.abc import Iterator, Sequence
from decimal import Decimal, InvalidOperation
from functools import cache
from string import ascii_uppercase
from typing import Any

from flashhead_dist.errors import UserError
from flashhead_dist.evaluate.tasks.base import Item, Judgement, Task, shots

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")
_STATED_NUMBER = re.compile(r"[Tt]he answer is[^\d.-]*(-?[\d.][\d,]*(?:\.\d+)?)")
_BOXED = ("\\boxed", "\\fbox")
# As the authors' own evaluate_from_local.py looks for it, without its last resort of any letter.
_STATED_LETTER = (
    re.compile(r"answer is:?\s*\(?([A-J])\b\)?"),
    re.compile(r"[aA]nswer:\s*\(?([A-J])\b"),
)


class Gsm8k(Task):
    """GSM8K: grade-school mathematics in words (Cobbe et al., arXiv 2110.14168).

    Eight worked examples of Wei et al. (arXiv 2201.11903, table 20); exact match of the final
    number. A line: `question`, and `answer` that ends in `#### <number>`.
    """

    name = "gsm8k"
    title = "GSM8K"
    folder = "gsm8k"
    stops = ("\nQ:", "\n\n")
    num_shots = 8

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
    stated = _STATED_NUMBER.search(text)
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


class Math500(Task):
    r"""MATH-500: competition mathematics (Hendrycks et al., arXiv 2103.03874; the 500 problems of
    Lightman et al., arXiv 2305.20050).

    Four worked examples; the last \boxed answer, the same as the truth for math-verify, which
    parses both into sympy (https://github.com/huggingface/Math-Verify). A line: `problem` and
    `answer`, in LaTeX; `unique_id` where there is one.
    """

    name = "math500"
    title = "MATH-500"
    folder = "math500"
    stops = ("\nProblem:", "\n\n\n")
    num_shots = 4

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
                "pip install -e '.[evaluate]', or leave math500 out of --tasks"
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


class MmluPro(Task):
    """MMLU-Pro: multiple choice of up to ten answers (Wang et al., arXiv 2406.01574).

    Chain of thought after three worked examples; the letter of "the answer is (X)". A line:
    `question`, `options` (a list), `answer` (a letter) and `question_id`.
    """

    name = "mmlu_pro"
    title = "MMLU-Pro"
    folder = "mmlu_pro"
    stops = ("\nQuestion:", "\n\n")
    num_shots = 3

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
    for pattern in _STATED_LETTER:
        found = pattern.search(text)
        if found is not None:
            return found[1]
    return None


class MtBench(Task):
    """MT-Bench: open questions of two turns (Zheng et al., arXiv 2306.05685); not scored.

    A line: `turns`, a list of two strings; `question_id` where there is one.
    """

    name = "mt_bench"
    title = "MT-Bench"
    folder = "mt_bench"
    stops = ("\nUser:",)
    num_turns = 2
    scored = False

    def read(self, line: dict[str, Any], number: int) -> Item:
        turns = tuple(line["turns"])
        if len(turns) != self.num_turns or not all(isinstance(turn, str) for turn in turns):
            raise ValueError(f"`turns` are not {self.num_turns} strings")
        return Item(self.name, str(line.get("question_id", number)), turns)

    def prompt(self, item: Item, answers: Sequence[str]) -> str:
        said = "".join(
            f"User: {turn}\nAssistant: {answer.strip()}\n"
            for turn, answer in zip(item.turns, answers, strict=False)
        )
        return f"{said}User: {item.turns[len(answers)]}\nAssistant:"

    def messages(self, item: Item, answers: Sequence[str]) -> list[dict[str, str]]:
        found = []
        for turn, answer in zip(item.turns, answers, strict=False):
            found.append({"role": "user", "content": turn})
            found.append({"role": "assistant", "content": answer.strip()})
        return [*found, {"role": "user", "content": item.turns[len(answers)]}]

    def judge(self, item: Item, answers: Sequence[str]) -> Judgement:
        return Judgement(None, None)


class IfEval(Task):
    """IFEval: instructions that a program can check (Zhou et al., arXiv 2311.07911).

    The rules are those of lm-eval (`lm_eval.tasks.ifeval`), the authors' own code as that project
    maintains it. An item is correct where every instruction is followed, by the strict rules. A
    line: `key`, `prompt`, `instruction_id_list` and `kwargs`, an object for each of these.
    """

    name = "ifeval"
    title = "IFEval"
    folder = "ifeval"

    def read(self, line: dict[str, Any], number: int) -> Item:
        names, kwargs = list(line["instruction_id_list"]), list(line["kwargs"])
        if not names or len(names) != len(kwargs):
            raise ValueError("`kwargs` are not one for each of `instruction_id_list`")
        truth = {"instruction_id_list": names, "kwargs": kwargs}
        return Item(self.name, str(line.get("key", number)), (line["prompt"],), truth)

    def prompt(self, item: Item, answers: Sequence[str]) -> str:
        return item.turns[0]

    def judge(self, item: Item, answers: Sequence[str]) -> Judgement:
        """final: a 1 or 0 an instruction. Not scored where a rule needs data that is not here.

        Raises:
            UserError: an instruction that there is no rule for.
        """
        rules = _rules()
        for name in item.truth["instruction_id_list"]:
            if name not in rules.instructions_registry.INSTRUCTION_DICT:
                raise UserError(
                    f"ifeval item {item.id} asks for {name}, for which lm-eval has no rule: take "
                    f"it out of the data"
                )
        asked = rules.InputExample(key=0, prompt=item.turns[0], **item.truth)
        try:
            with _same_draws(item.id):
                strict = rules.test_instruction_following_strict(asked, answers[0])
                loose = rules.test_instruction_following_loose(asked, answers[0])
        except LookupError:
            return Judgement(None, None, {"not_scored": "nltk's punkt_tab is not installed"})
        followed = "".join("01"[bool(one)] for one in strict.follow_instruction_list)
        details = {"loose": bool(loose.follow_all_instructions)}
        return Judgement(followed, bool(strict.follow_all_instructions), details)

    def require(self) -> None:
        _rules()


@contextlib.contextmanager
def _same_draws(seed: str) -> Iterator[None]:
    """A rule draws what it cannot use from `random`: for the letter `!`, say, another letter.

    Two answers to an item are to meet the same rule.
    """
    state = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(state)


@cache
def _rules() -> Any:
    """lm-eval's module of rules.

    Raises:
        UserError: lm-eval, or what its rules need, is not installed.
    """
    try:
        # On its first import it fetches sentence boundaries, and says so on standard output.
        with contextlib.redirect_stdout(sys.stderr):
            from lm_eval.tasks.ifeval import utils
        from langdetect import DetectorFactory
    except ImportError as error:
        raise UserError(
            f"ifeval is judged by the rules of lm-eval, which cannot be imported ({error}): "
            f"pip install -e '.[lm-eval]', or leave ifeval out of --tasks"
        ) from error
    # Otherwise it guesses the language of a short text anew each time.
    DetectorFactory.seed = 0
    return utils
