"""Prompts to decode: a file's, standard input's, or twenty from the corpus that ships."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from flashhead_dist.errors import UserError
from flashhead_dist.states.split import split_by_document
from flashhead_dist.states.texts import Document, shipped_texts

LANGUAGES = ("fr", "hi", "ja", "ru", "sw")
_EACH = 5
_A_LANGUAGE = 2
_OPENING = 80
"""Characters of a passage that are given, the model to go on from there."""


@dataclass(frozen=True)
class Prompt:
    """A text to go on from. source: what kind it is, such as `mt_bench` or a language code."""

    source: str
    text: str


def held_out_prompts(count: int) -> list[Prompt]:
    """The first `count` prompts of the corpus's test documents, on which no index is calibrated.

    Questions of MT-Bench, problems of GSM8K and openings of passages in some 26 languages take
    turns, so that any part from the start is a mixture.

    Raises:
        UserError: more prompts than there are documents.
    """
    documents = shipped_texts()
    parts = split_by_document(documents)
    tested = [d for d, part in zip(documents, parts, strict=True) if part == "test"]
    chat = [Prompt("mt_bench", _question(d)) for d in _named(tested, "mt_bench-")]
    mathematics = [Prompt("gsm8k", _problem(d)) for d in _named(tested, "gsm8k-")]
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
        *map(_question, chat),
        *map(_problem, mathematics),
        *openings,
    ]


def _named(documents: Iterable[Document], start: str) -> list[Document]:
    return [document for document in documents if document.name.startswith(start)]


def _question(document: Document) -> str:
    return document.text.split("\n")[0] + "\n"


def _problem(document: Document) -> str:
    return document.text.split("\nAnswer")[0] + "\nAnswer:"


def _opening(text: str) -> str:
    """The first words of a passage; of one without spaces, the first characters."""
    end = text.rfind(" ", 0, _OPENING)
    return text[: end if end > 0 else _OPENING]
