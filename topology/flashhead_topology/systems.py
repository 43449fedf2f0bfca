"""System files: the shipped ones by name, a user's by path, and how calibration writes one.

Every figure in a file is a mapping that says where it comes from; see `system.Source`:

    memory_bandwidth_bytes_per_s: {value: 3.35e+12, kind: data sheet, source: "https://..."}

Figures are in base units: seconds, bytes, operations. A file has figures of its own or names a
shipped processor and links, so that what several systems share is written once:

    processor: h100_sxm
    levels:
      - {link: nvlink_4, ranks: 8}
      - {link: infiniband_ndr, ranks: 1024}
"""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from flashhead_topology.system import (
    Level,
    Source,
    SourceKind,
    System,
    SystemFileError,
    levels_within,
)
from flashhead_topology.system_document import parse_level, parse_system, system_document

__all__ = [
    "Level",
    "Source",
    "SourceKind",
    "System",
    "SystemFileError",
    "levels_within",
    "list_systems",
    "load_link",
    "load_processor",
    "load_system",
    "save_system",
]

_FOLDER = Path(__file__).parent / "systems"
_LINKS = _FOLDER / "links"
_PROCESSORS = _FOLDER / "processors"


def list_systems() -> list[str]:
    """Names of the shipped systems, sorted."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def load_system(name_or_path: str | Path) -> System:
    """The shipped system of that name, or the one in a file.

    What ends in `.yaml` or `.yml`, or holds a separator, is a path.

    Raises:
        SystemFileError: no such system or file, or one that is no system; names what to mend.
    """
    text = str(name_or_path)
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml") and len(path.parts) == 1:
        if text not in list_systems():
            raise SystemFileError(
                f"there is no system named {text!r}: choose one of {', '.join(list_systems())}, "
                "or give the path of a .yaml file"
            )
        path = _FOLDER / f"{text}.yaml"
    document = _read(path)
    try:
        return parse_system(document, load_link, load_processor)
    except (ValueError, TypeError) as error:
        raise SystemFileError(f"{path} is no system: {error}") from error


def load_link(name: str, ranks: int) -> Level:
    """The shipped link `name` as a level that joins `ranks` ranks.

    Raises:
        SystemFileError: no such link, or fewer than 2 ranks.
    """
    document = _read_shipped(_LINKS, name, "link")
    try:
        return parse_level({"name": name, "ranks": ranks, **document}, load_link)
    except (ValueError, TypeError) as error:
        raise SystemFileError(f"link {name} joins no {ranks} ranks: {error}") from error


def load_processor(name: str) -> dict[str, Any]:
    """Device and figures of a shipped processor, as a system file holds them.

    Raises:
        SystemFileError: no such processor.
    """
    return _read_shipped(_PROCESSORS, name, "processor")


def save_system(system: System, path: str | Path, *, overwrite: bool = False) -> None:
    """Write `system` as a file that `load_system` reads back to an equal one.

    Raises:
        SystemFileError: a file is there already and `overwrite` is not set, the folder cannot be
            written, or a figure has no source.
    """
    path = Path(path)
    if path.suffix not in (".yaml", ".yml"):
        raise SystemFileError(f"{path} must end in .yaml: it would not be found again as a file")
    if path.exists() and not overwrite:
        raise SystemFileError(f"{path} is there already: give another name or remove it first")
    document = system_document(system)
    _write(path, yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=100))


def _read_shipped(folder: Path, name: str, what: str) -> dict[str, Any]:
    names = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in names:
        raise SystemFileError(
            f"there is no {what} named {name!r}: choose one of {', '.join(names)}"
        )
    return _read(folder / f"{name}.yaml")


def _write(path: Path, text: str) -> None:
    """All of the file or none of it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            Path(name).chmod(0o644)
            Path(name).replace(path)
        except BaseException:
            with suppress(OSError):
                Path(name).unlink()
            raise
    except OSError as error:
        raise SystemFileError(
            f"cannot write {path} ({error.strerror or error}): free space or choose another folder"
        ) from error


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SystemFileError(
            f"cannot read {path} ({reason}): give one of {', '.join(list_systems())} or the path "
            "of a .yaml file"
        ) from error
    try:
        document = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        raise SystemFileError(f"{path} is not YAML{where} ({first}): correct it") from error
    if not isinstance(document, dict):
        raise SystemFileError(f"{path} holds no mapping: start it with `schema_version: 1`")
    return document
