"""IFEval: instructions that a program can check (Zhou et al., arXiv 2311.07911).

The rules are those of lm-eval (`lm_eval.tasks.ifeval`), the authors' own code as that project
maintains it. An item is correct where every instruction is followed, by the strict rules.
"""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, ClassVar

from flashhead_dist.errors import UserError
from flashhead_dist.evaluate.tasks.task import Item, Judgement, Task


class IfEval(Task):
    """A line: `key`, `prompt`, `instruction_id_list` and `kwargs`, an object for each of these."""

    name: ClassVar[str] = "ifeval"
    title: ClassVar[str] = "IFEval"
    folder: ClassVar[str] = "ifeval"

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
            f"pip install 'flashhead-dist[lm-eval]', or leave ifeval out of --tasks"
        ) from error
    # Otherwise it guesses the language of a short text anew each time.
    DetectorFactory.seed = 0
    return utils
