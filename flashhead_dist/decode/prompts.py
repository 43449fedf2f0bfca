"""Prompts to decode: a file's, standard input's, or twenty from the corpus that ships."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from flashhead_dist.errors import UserError
from flashhead_dist.states.split import Document, shipped_texts, split_by_document

LANGUAGES = ("fr", "hi", "ja", "ru", "sw")
_OPENING = 80
"""Characters of a passage in a prompt, at most."""


@dataclass(frozen=True)
class Prompt:
    """A text to continue. source: its kind, such as `mt_bench` or a language code."""

    source: str
    text: str


def held_out_prompts(count: int) -> list[Prompt]:
    """The first `count` prompts of the corpus's test documents, on which no index is calibrated.

    Questions of MT-Bench, problems of GSM8K and openings of passages in some 26 languages
    alternate, so that the first prompts are a mixture too.

    Raises:
        UserError: more prompts than there are documents.
    """
    documents = shipped_texts()
    parts = split_by_document(documents)
    tested = [d for d, part in zip(documents, parts, strict=True) if part == "test"]
    chat = [Prompt("mt_bench", text) for text in _questions(tested)]
    mathematics = [Prompt("gsm8k", text) for text in _problems(tested)]
    passages = [
        Prompt(d.source, _opening(d.text)) for d in tested if d.name.startswith(f"{d.source}-")
    ]
    half = -(-len(passages) // 2)
    turns = zip_longest(chat, passages[:half], mathematics, passages[half:])
    prompts = [prompt for turn in turns for prompt in turn if prompt is not None]
    if count > len(prompts):
        raise UserError(
            f"{count} prompts are more than the {len(prompts)} of the corpus's test documents: ask "
            f"for fewer, or give a file of your own with --prompts"
        )
    return prompts[:count]


def read_prompts(path: Path | None) -> list[str]:
    """The prompts of a file, of standard input for `-`, of the corpus where None.

    A .jsonl line is an object with a string `prompt`, `text` or `question`, or a list `turns` whose
    first is taken. Anything else is a prompt a line; empty lines are left out.

    Raises:
        UserError: no such file, a line that is not like this, or nothing in it.
    """
    if path is None:
        return builtin_prompts()
    named = "standard input" if str(path) == "-" else str(path)
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}): give a UTF-8 text file") from error
    lines = [line for line in text.splitlines() if line.strip()]
    if path.suffix == ".jsonl":
        lines = [_prompt_of(line, number, named) for number, line in enumerate(lines, start=1)]
    if not lines:
        raise UserError(f"{named} holds no prompt: give one a line, or .jsonl with a `prompt` each")
    return lines


def _prompt_of(line: str, number: int, named: str) -> str:
    try:
        item: Any = json.loads(line)
        found = next(item[key] for key in ("prompt", "text", "question", "turns") if key in item)
        prompt = found[0] if isinstance(found, list) else found
        if not isinstance(prompt, str):
            raise TypeError
    except (ValueError, TypeError, StopIteration, IndexError) as error:
        raise UserError(
            f"line {number} of {named} is no JSON object with a string `prompt`, `text` or "
            f"`question`, nor a list of strings `turns`: correct it"
        ) from error
    return prompt


def check_lengths(
    prompts: Iterable[Sequence[int]], max_new_tokens: int, context_length: int | None
) -> None:
    """Raise UserError for a prompt without tokens, or one that does not fit the model's context."""
    for number, prompt in enumerate(prompts, start=1):
        if not prompt:
            raise UserError(f"prompt {number} has no tokens: write something in it")
        if context_length is not None and len(prompt) + max_new_tokens > context_length:
            raise UserError(
                f"prompt {number} has {len(prompt)} tokens and {max_new_tokens} new ones are asked "
                f"for, more than the model's context of {context_length}: shorten it, or give "
                f"fewer --max-new-tokens"
            )


def builtin_prompts() -> list[str]:
    """Five prompts of MT-Bench, five of GSM8K, and two openings of passages in five languages."""
    documents = shipped_texts()
    openings = [
        _opening(text) for language in LANGUAGES for text in _texts(documents, f"{language}-")[:2]
    ]
    return [*_questions(documents)[:5], *_problems(documents)[:5], *openings]


def _texts(documents: Iterable[Document], start: str) -> list[str]:
    return [document.text for document in documents if document.name.startswith(start)]


def _questions(documents: Iterable[Document]) -> list[str]:
    return [text.split("\n")[0] + "\n" for text in _texts(documents, "mt_bench-")]


def _problems(documents: Iterable[Document]) -> list[str]:
    return [text.split("\nAnswer")[0] + "\nAnswer:" for text in _texts(documents, "gsm8k-")]


def _opening(text: str) -> str:
    """The first words of a passage; of one without spaces, the first characters."""
    end = text.rfind(" ", 0, _OPENING)
    return text[: end if end > 0 else _OPENING]
