"""Prompts to decode: a file's, standard input's, or twenty from the corpus that ships."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flashhead_dist.errors import UserError
from flashhead_dist.hidden_states.texts import Document, shipped_texts

LANGUAGES = ("fr", "hi", "ja", "ru", "sw")
_EACH = 5
_A_LANGUAGE = 2
_OPENING = 80
"""Characters of a passage that are given, the model to go on from there."""


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


def builtin_prompts() -> list[str]:
    """Five prompts of MT-Bench, five of GSM8K, and two openings of passages in five languages."""
    documents = shipped_texts()
    chat = _named(documents, "mt_bench-")[:_EACH]
    mathematics = _named(documents, "gsm8k-")[:_EACH]
    openings = [
        _opening(document.text)
        for language in LANGUAGES
        for document in _named(documents, f"{language}-")[:_A_LANGUAGE]
    ]
    return [
        *(document.text.split("\n")[0] + "\n" for document in chat),
        *(document.text.split("\nAnswer")[0] + "\nAnswer:" for document in mathematics),
        *openings,
    ]


def _named(documents: Iterable[Document], start: str) -> list[Document]:
    return [document for document in documents if document.name.startswith(start)]


def _opening(text: str) -> str:
    """The first words of a passage; of one without spaces, the first characters."""
    end = text.rfind(" ", 0, _OPENING)
    return text[: end if end > 0 else _OPENING]
