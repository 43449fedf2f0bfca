"""Choices that one run measures and later runs reuse: the one cache behind every autotuner.

An entry is found by its kind and by all that its figures depend on: a mapping of JSON values that
must be equal in full, versions and the kernels' hash among them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flashhead_dist.errors import ModelSourceError
from flashhead_dist.models.cache import cache_root, locked, publish
from flashhead_kernels import launch_choice

_SCHEMA_VERSION = 1
_Entry = dict[str, Any]


class MeasuredChoices:
    """The entries of one `kind` in the file `path`, to which processes may add at the same time.

    remeasure: find nothing. not_kept: why the last choice could not be written, or None.
    """

    def __init__(self, path: Path, kind: str, *, remeasure: bool = False) -> None:
        self.path, self.kind = path, kind
        self.not_kept: str | None = None
        self._remeasure = remeasure

    def find(self, case: Mapping[str, Any]) -> dict[str, Any] | None:
        """What was measured of `case`; None where there is nothing.

        Raises ModelSourceError where the file is damaged.
        """
        if self._remeasure:
            return None
        return next((dict(e["found"]) for e in self._entries() if self._is_of(e, case)), None)

    def keep(self, case: Mapping[str, Any], found: Mapping[str, Any]) -> str | None:
        """Keep `found` for `case` in place of what was there; the reason where it cannot be.

        A cache that is made elsewhere and only read here is no mistake, and no run ends for it.
        """
        self.not_kept = None
        try:
            with locked(self.path):
                entries = [entry for entry in self._entries() if not self._is_of(entry, case)]
                entries.append({"kind": self.kind, "of": dict(case), "found": dict(found)})
                document = {"schema_version": _SCHEMA_VERSION, "entries": entries}
                text = json.dumps(document, indent=1, allow_nan=False) + "\n"
                publish(self.path, lambda temporary: _write(temporary, text))
        except ModelSourceError as error:
            self.not_kept = str(error)
        return self.not_kept

    def _is_of(self, entry: _Entry, case: Mapping[str, Any]) -> bool:
        return bool(entry["kind"] == self.kind and entry["of"] == case)

    def _entries(self) -> list[_Entry]:
        try:
            document = json.loads(self.path.read_text(encoding="utf-8"))
            if document["schema_version"] != _SCHEMA_VERSION:
                return []
            return [
                {"kind": str(e["kind"]), "of": dict(e["of"]), "found": dict(e["found"])}
                for e in document["entries"]
            ]
        except FileNotFoundError:
            return []
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelSourceError(
                f"The measured choices {self.path} cannot be read ({error}); delete the file, and "
                "they are measured again."
            ) from error


def measured_choices(kind: str, *, remeasure: bool = False) -> MeasuredChoices:
    """The choices of one kind in the cache folder."""
    path = cache_root() / "measurements" / "choices.json"
    return MeasuredChoices(path, kind, remeasure=remeasure)


def keep_launches(*, remeasure: bool = False) -> None:
    """Let this process's kernels find and keep their choices; the first call decides."""
    if launch_choice.table.store is None:
        launch_choice.table.store = measured_choices("launches", remeasure=remeasure)


def describe_launches() -> dict[str, Any]:
    """This process's choices so far, with their times, as JSON values; none without CUDA."""
    store = launch_choice.table.store
    return {
        "choices": launch_choice.table.choices(),
        "not_kept": store.not_kept if isinstance(store, MeasuredChoices) else None,
    }


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
