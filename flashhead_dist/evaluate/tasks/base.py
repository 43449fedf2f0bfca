"""A task: a data set of items, how each is asked and how its answer is judged."""

from __future__ import annotations

import json
import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from flashhead_dist.errors import UserError
from flashhead_dist.states.split import shipped_texts

_SHOTS = Path(__file__).with_name("shots")


@dataclass(frozen=True)
class Item:
    """One question. turns: what the user says, in order; truth: what judges the answer."""

    task: str
    id: str
    turns: tuple[str, ...]
    truth: Any = None


@dataclass(frozen=True)
class Judgement:
    """What an answer comes to.

    final: the answer that counts, None where there is none to be found. correct: None where the
    task has no score, or this item cannot be scored here. details: further figures of the task.
    """

    final: str | None
    correct: bool | None
    details: dict[str, Any] = field(default_factory=dict)


class Task(ABC):
    """How a data set is read, asked and judged."""

    name: ClassVar[str]
    title: ClassVar[str]
    """What tables call it."""
    folder: ClassVar[str]
    """Under the data folder; holds one .jsonl file."""
    stops: ClassVar[tuple[str, ...]] = ()
    """An answer ends before the first of these."""
    max_new_tokens: ClassVar[int] = 256
    num_turns: ClassVar[int] = 1
    num_shots: ClassVar[int] = 0
    scored: ClassVar[bool] = True

    @abstractmethod
    def read(self, line: dict[str, Any], number: int) -> Item:
        """The item of one line of the file, `number` from 0.

        Raises:
            KeyError, TypeError, ValueError: a line that is not like this task's.
        """

    @abstractmethod
    def prompt(self, item: Item, answers: Sequence[str]) -> str:
        """The text to be continued, after the `answers` to the turns before."""

    def messages(self, item: Item, answers: Sequence[str]) -> list[dict[str, str]]:
        """The same for a chat template; worked examples go into the user's message."""
        return [{"role": "user", "content": self.prompt(item, answers)}]

    @abstractmethod
    def judge(self, item: Item, answers: Sequence[str]) -> Judgement:
        """Look at the answers to all turns."""

    def same_final(self, left: str | None, right: str | None) -> bool:
        """Whether two finals are the same answer."""
        return left is not None and left == right

    def require(self) -> None:  # noqa: B027
        """Raise UserError where a library that judges is missing; most tasks need none."""

    def cut(self, text: str) -> str:
        """`text` up to the first of `stops`."""
        ends = [place for stop in self.stops if (place := text.find(stop)) >= 0]
        return text[: min(ends)] if ends else text


def shots(name: str) -> str:
    """Worked examples, as they stand before every question; see shots/README.md."""
    return (_SHOTS / f"{name}.txt").read_text(encoding="utf-8").strip() + "\n\n"


def read_items(task: Task, data: Path) -> tuple[list[Item], int]:
    """Items of `data`/<folder>/*.jsonl, shuffled with a fixed seed, and how many were left out.

    The first N of them are a sample of the whole file, and part of the first N + 1. Left out are
    items whose text is in the shipped corpus, over which a default index is calibrated.

    Raises:
        UserError: no such file or more than one, a line that is not like the task's, no item left.
    """
    path = _find_file(task, data)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}): give a UTF-8 text file") from error
    items = []
    for number, line in enumerate(lines):
        if line.strip():
            try:
                items.append(task.read(json.loads(line), number))
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise UserError(
                    f"line {number + 1} of {path} is no item of {task.name} ({error}): "
                    f"docs/guides/evaluation.md gives its fields"
                ) from error
    random.Random(0).shuffle(items)
    fresh = [item for item in items if _squeeze(item.turns[0]) not in _shipped()]
    if not fresh:
        raise UserError(f"{path} holds no item that the shipped corpus does not: give another file")
    return fresh, len(items) - len(fresh)


def _find_file(task: Task, data: Path) -> Path:
    found = sorted((data / task.folder).glob("*.jsonl"))
    if len(found) != 1:
        raise UserError(
            f"{data / task.folder} holds {len(found)} .jsonl files: give --data a folder with one "
            f"in {task.folder}/ (docs/guides/evaluation.md names its source), or leave {task.name} "
            f"out of --tasks"
        )
    return found[0]


@cache
def _shipped() -> str:
    return "\n".join(_squeeze(document.text) for document in shipped_texts())


def _squeeze(text: str) -> str:
    return " ".join(text.split())
