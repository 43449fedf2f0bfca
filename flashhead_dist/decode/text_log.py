"""The texts of a run, kept on every rank, so that whichever is left can save them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flashhead_dist.decode.engine import Variant
from flashhead_dist.decode.sequences import DecodeState
from flashhead_dist.errors import UserError

INTERRUPTED_NAME = Path("generate-interrupted.jsonl")
"""Where the texts of a run that was cut short go if no file was named."""


class TextLog:
    """Texts that are finished and states that are under way."""

    def __init__(self, tokenizer: Any, path: Path | None) -> None:
        """path: a .jsonl file that finished texts are written to; None for none.

        Raises:
            UserError: the file cannot be written.
        """
        self._tokenizer, self._path = tokenizer, path
        self._finished: list[dict[str, Any]] = []
        self._label = ""
        self._first = 0
        self._states: Sequence[DecodeState] = ()
        if path is not None:
            try:
                path.write_text("", encoding="utf-8")
            except OSError as error:
                raise UserError(f"{path} cannot be written ({error.strerror}): name another") from (
                    error
                )

    def begin(self, variant: Variant, states: Sequence[DecodeState], first_prompt: int) -> None:
        """These states are about to be decoded."""
        self.end()
        self._label, self._states, self._first = variant.label, states, first_prompt

    def end(self) -> None:
        """Take over what the states under way have produced; writes it where a file is named."""
        lines = self._under_way()
        self._states = ()
        self._finished += lines
        if self._path is not None and lines:
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)

    def _under_way(self) -> list[dict[str, Any]]:
        lines, number = [], self._first
        for state in self._states:
            for row in range(state.batch_size):
                reason = state.finish_reason(row)
                lines.append(
                    {
                        "head": self._label,
                        "prompt": number,
                        "text": self._tokenizer.decode(state.tokens(row), skip_special_tokens=True),
                        "finish_reason": None if reason is None else reason.value,
                    }
                )
                number += 1
        return lines

    def save_interrupted(self) -> str:
        """Save everything so far; a sentence that says where, for parting words."""
        lines = [line for line in [*self._finished, *self._under_way()] if line["text"]]
        if not lines:
            return " No text was produced yet."
        path = self._path or INTERRUPTED_NAME
        try:
            path.write_text(
                "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines),
                encoding="utf-8",
            )
        except OSError as error:
            return f" The text so far could not be saved in {path} ({error.strerror})."
        return f" The text so far is in {path}."
