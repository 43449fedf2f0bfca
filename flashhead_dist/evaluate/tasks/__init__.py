"""Tasks that compare the answers of heads; see docs/guides/evaluation.md."""

from __future__ import annotations

from flashhead_dist.errors import UserError
from flashhead_dist.evaluate.tasks.base import Item, Judgement, Task, read_items
from flashhead_dist.evaluate.tasks.questions import Gsm8k, IfEval, Math500, MmluPro, MtBench

__all__ = ["TASK_NAMES", "Item", "Judgement", "Task", "find_tasks", "read_items"]

_TASKS: dict[str, Task] = {
    task.name: task for task in (Gsm8k(), Math500(), MmluPro(), IfEval(), MtBench())
}
TASK_NAMES = tuple(_TASKS)


def find_tasks(names: str) -> list[Task]:
    """The tasks of a comma-separated list, each once.

    Raises:
        UserError: a name that is none of TASK_NAMES, or no name.
    """
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    for name in wanted or [names]:
        if name not in _TASKS:
            raise UserError(f"there is no task named {name!r}: choose from {', '.join(TASK_NAMES)}")
    return [_TASKS[name] for name in dict.fromkeys(wanted)]
