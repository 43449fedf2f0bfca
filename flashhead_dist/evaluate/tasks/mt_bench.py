"""MT-Bench: open questions of two turns (Zheng et al., arXiv 2306.05685). Answers, no judge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from flashhead_dist.evaluate.tasks.task import Item, Judgement, Task


class MtBench(Task):
    """A line: `turns`, a list of two strings; `question_id` where there is one."""

    name: ClassVar[str] = "mt_bench"
    title: ClassVar[str] = "MT-Bench"
    folder: ClassVar[str] = "mt_bench"
    stops: ClassVar[tuple[str, ...]] = ("\nUser:",)
    num_turns: ClassVar[int] = 2
    scored: ClassVar[bool] = False

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
