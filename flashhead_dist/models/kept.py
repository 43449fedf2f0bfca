"""Measurements that one run takes and others find, in a JSON file of the cache.

An entry is found by what it was measured of: a mapping of JSON values that must be equal in whole.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flashhead_dist.models.cache import locked, publish
from flashhead_dist.models.errors import ModelSourceError

_SCHEMA_VERSION = 1


class KeptMeasurements:
    """The file `path`, which processes may read and add to at the same time."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def find(self, case: Mapping[str, Any]) -> dict[str, Any] | None:
        """What was kept of `case`; None where there is nothing.

        Raises ModelSourceError where the file is damaged.
        """
        return next((found for of, found in self._entries() if of == case), None)

    def keep(self, case: Mapping[str, Any], found: Mapping[str, Any]) -> str | None:
        """Keep `found` for `case` in place of what was there; the reason where it cannot be.

        A cache that is made elsewhere and only read here is no mistake, and no run ends for it.
        """
        try:
            with locked(self.path):
                others = [entry for entry in self._entries() if entry[0] != case]
                entries = [{"of": of, "found": got} for of, got in (*others, (case, found))]
                document = {"schema_version": _SCHEMA_VERSION, "entries": entries}
                text = json.dumps(document, indent=1, allow_nan=False) + "\n"
                publish(self.path, lambda temporary: _write(temporary, text))
        except ModelSourceError as error:
            return str(error)
        return None

    def _entries(self) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        try:
            document = json.loads(self.path.read_text(encoding="utf-8"))
            if document["schema_version"] != _SCHEMA_VERSION:
                return []
            return [(dict(entry["of"]), dict(entry["found"])) for entry in document["entries"]]
        except FileNotFoundError:
            return []
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelSourceError(
                f"The kept measurements {self.path} cannot be read ({error}); delete the file, and "
                "they are taken again."
            ) from error


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
