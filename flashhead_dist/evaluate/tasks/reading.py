"""Items of a task from a folder of data sets, in an order that does not change."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path

from flashhead_dist.errors import UserError
from flashhead_dist.evaluate.tasks.task import Item, Task
from flashhead_dist.states.texts import shipped_texts


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
                    f"docs/tasks.md gives its fields"
                ) from error
    random.Random(0).shuffle(items)
    fresh = [item for item in items if not _is_shipped(item)]
    if not fresh:
        raise UserError(f"{path} holds no item that the shipped corpus does not: give another file")
    return fresh, len(items) - len(fresh)


def _find_file(task: Task, data: Path) -> Path:
    found = sorted((data / task.folder).glob("*.jsonl"))
    if len(found) != 1:
        raise UserError(
            f"{data / task.folder} holds {len(found)} .jsonl files: give --data a folder with one "
            f"in {task.folder}/ (docs/tasks.md says where it is published), or leave {task.name} "
            f"out of --tasks"
        )
    return found[0]


def _is_shipped(item: Item) -> bool:
    return _squeeze(item.turns[0]) in _shipped()


@cache
def _shipped() -> str:
    return "\n".join(_squeeze(document.text) for document in shipped_texts())


def _squeeze(text: str) -> str:
    return " ".join(text.split())
