"""What was measured, a line each, so that a run that ends early is taken up where it ended.

The first line names the inputs. A line without its newline is what a killed run left and is cut.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from flashhead_dist.errors import UserError

_INPUTS = "inputs"


class Journal:
    """Finished measurements by name, kept in a file of JSON lines."""

    def __init__(self, path: Path, inputs: dict[str, Any]) -> None:
        """Open or begin `path`; inputs: what the measurements are of, JSON-ready.

        Raises:
            UserError: the file holds measurements of other inputs, is damaged, or cannot be
                written.
        """
        self._path = path
        self._entries: dict[str, Any] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            stored = path.read_bytes() if path.exists() else b""
            whole = stored[: stored.rfind(b"\n") + 1]
            if whole != stored:
                os.truncate(path, len(whole))
            entries = self._parse(whole)
            if not entries:
                self._append(_INPUTS, inputs)
            elif entries.get(_INPUTS) != json.loads(json.dumps(inputs)):
                raise UserError(
                    f"{path} holds measurements of other states, weights or options: give another "
                    "--out, or delete it"
                )
            self._entries |= {name: entry for name, entry in entries.items() if name != _INPUTS}
        except OSError as error:
            raise self._unwritable(error) from error

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __getitem__(self, name: str) -> Any:
        return self._entries[name]

    def add(self, name: str, entry: Any) -> None:
        """Keep a finished measurement; on the disk when this returns."""
        try:
            self._append(name, entry)
        except OSError as error:
            raise self._unwritable(error) from error
        self._entries[name] = entry

    def _append(self, name: str, entry: Any) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([name, entry]) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _parse(self, stored: bytes) -> dict[str, Any]:
        try:
            return dict(json.loads(line) for line in stored.splitlines())
        except (ValueError, TypeError) as error:
            raise UserError(
                f"{self._path} is damaged ({error}): delete it, or give another --out"
            ) from error

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(f"{self._path} cannot be written ({error.strerror}): give another --out")
