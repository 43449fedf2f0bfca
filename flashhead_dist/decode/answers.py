"""Items of tasks answered by several variants in turn, batch by batch, into records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flashhead_dist.decode.engine import Engine, Variant
from flashhead_dist.decode.sequences import DecodeState
from flashhead_dist.errors import UserError
from flashhead_dist.evaluate.tasks import Item, Task

_TAIL = 16
"""Tokens at the end of a text that are searched for a stop string at every step."""


@dataclass(frozen=True)
class AskOptions:
    """How a model is asked. max_new_tokens: of a turn; the task's own where None."""

    batch_size: int = 8
    max_new_tokens: int | None = None
    chat: bool = False

    def new_tokens(self, task: Task) -> int:
        """The most tokens of one turn's answer."""
        return self.max_new_tokens or task.max_new_tokens


class _Answers:
    """The answers of one variant to a batch, by item, and the seconds of all turns."""

    def __init__(self, num_items: int) -> None:
        self.prompts: list[list[str]] = [[] for _ in range(num_items)]
        self.texts: list[list[str]] = [[] for _ in range(num_items)]
        self.tokens: list[list[int]] = [[] for _ in range(num_items)]
        self.reasons: list[list[str]] = [[] for _ in range(num_items)]
        self.first_token_s = self.later_s = 0.0
        self.later_tokens = 0


def batches(
    engine: Engine, task: Task, items: Sequence[Item], options: AskOptions
) -> list[list[Item]]:
    """Items of about the same prompt length together, the shortest first."""
    lengths = {item.id: len(_token_ids(engine, task, item, [], options)[1]) for item in items}
    ordered = sorted(items, key=lambda item: lengths[item.id])
    size = options.batch_size
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def answer_batch(
    engine: Engine,
    variants: Sequence[Variant],
    task: Task,
    items: Sequence[Item],
    options: AskOptions,
    *,
    turn: int = 0,
) -> list[dict[str, Any]]:
    """Records of `items`, as `evaluate.tasks.records` describes them.

    variants: the first is the reference of the others. turn: rotates their order.

    Raises:
        UserError: a prompt that does not fit the model, or a tokenizer without a chat template.
    """
    order = [variants[(place + turn) % len(variants)] for place in range(len(variants))]
    answers = {variant: _answer(engine, variant, task, items, options) for variant in order}
    truth = answers[variants[0]]

    def record(row: int, own: _Answers) -> dict[str, Any]:
        judged = task.judge(items[row], own.texts[row])
        same = own.texts[row] == truth.texts[row]
        difference = None if same else first_difference(own.tokens[row], truth.tokens[row])
        return {
            "texts": own.texts[row],
            "final": judged.final,
            "correct": judged.correct,
            "details": judged.details,
            "num_tokens": len(own.tokens[row]),
            "finish_reasons": own.reasons[row],
            "first_difference": difference,
            "batch_tokens": own.later_tokens,
            "batch_s": own.later_s,
            "batch_first_token_s": own.first_token_s,
        }

    return [
        {
            "task": task.name,
            "item": item.id,
            "batch": f"{task.name}-{items[0].id}",
            "truth": item.truth,
            "prompts": {v.label: answers[v].prompts[row] for v in variants},
            "answers": {v.label: record(row, answers[v]) for v in variants},
        }
        for row, item in enumerate(items)
    ]


def first_difference(left: Sequence[int], right: Sequence[int]) -> int:
    """The first index at which two texts differ, or one has ended."""
    pairs = zip(left, right, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))


def _answer(
    engine: Engine, variant: Variant, task: Task, items: Sequence[Item], options: AskOptions
) -> _Answers:
    """All turns of all items."""
    found = _Answers(len(items))
    for _ in range(task.num_turns):
        asked = [
            _token_ids(engine, task, item, found.texts[row], options)
            for row, item in enumerate(items)
        ]
        state = DecodeState(
            [ids for _, ids in asked],
            max_new_tokens=options.new_tokens(task),
            stop_token_ids=engine.stop_token_ids,
            pad_token_id=engine.pad_token_id,
            check_every=variant.check_every,
        )

        def stop(_: int = 0, state: DecodeState = state) -> None:
            """End each sequence whose text holds one of the task's stop strings."""
            for row in range(state.batch_size if task.stops else 0):
                if state.finish_reason(row) is None:
                    tail = engine.tokenizer.decode(state.tokens(row)[-_TAIL:])
                    if task.cut(tail) != tail:
                        state.stop(row)

        (times,), _ = engine.decode(variant, [state], stop)
        found.first_token_s += times.first_token_s
        found.later_s += times.total_s - times.first_token_s
        found.later_tokens += sum(len(state.tokens(row)) - 1 for row in range(len(items)))
        for row in range(len(items)):
            tokens = state.tokens(row)
            found.prompts[row].append(asked[row][0])
            found.tokens[row] += tokens
            text = engine.tokenizer.decode(tokens, skip_special_tokens=True)
            found.texts[row].append(task.cut(text))
            found.reasons[row].append(str(state.finish_reason(row)))
    return found


def _token_ids(
    engine: Engine, task: Task, item: Item, answers: Sequence[str], options: AskOptions
) -> tuple[str, list[int]]:
    """The prompt of the next turn, as text and as tokens."""
    tokenizer = engine.tokenizer
    if options.chat:
        if not tokenizer.chat_template:
            raise UserError(
                f"{engine.model.name} has no chat template in its tokenizer: leave out --chat"
            )
        text = tokenizer.apply_chat_template(
            task.messages(item, answers), tokenize=False, add_generation_prompt=True
        )
    else:
        text = task.prompt(item, answers)
    # A chat template writes its own <bos>.
    ids = tokenizer(text, add_special_tokens=not options.chat).input_ids
    total, context = len(ids) + options.new_tokens(task), engine.context_length
    if context is not None and total > context:
        raise UserError(
            f"item {item.id} of {task.name} has {len(ids)} tokens and {options.new_tokens(task)} "
            f"new ones are asked for, more than the model's context of {context}: give fewer "
            f"--max-new-tokens, or leave {task.name} out of --tasks"
        )
    return text, ids
