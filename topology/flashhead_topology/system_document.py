"""A system as the plain mapping that a YAML file holds, and back.

Every figure is `{value, kind, source}`, with `note` and `relative_error` where there are any.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

from flashhead_topology.machine import DeviceType
from flashhead_topology.system import Level, Source, System, SystemFileError

SCHEMA_VERSION = 1
_LEVEL_FIGURES = ("alpha_s", "beta_s_per_byte", "base_s", "one_shot_alpha_s")
_SYSTEM_FIGURES = (
    "memory_bandwidth_bytes_per_s",
    "memory_share",
    "gather_share",
    "launch_s",
    "peak_flop_per_s",
    "memory_bytes",
)
_SOURCE_KEYS = ("kind", "source", "note", "relative_error")
_SYSTEM_KEYS = {
    "schema_version",
    "name",
    "description",
    "processor",
    "device",
    "device_type",
    "algorithm",
    "levels",
    *_SYSTEM_FIGURES,
}

LoadLink = Callable[[str, int], Level]
"""The level that a shipped link makes of so many ranks."""
LoadProcessor = Callable[[str], dict[str, Any]]
"""The device and the figures of a shipped processor."""


def system_document(system: System) -> dict[str, Any]:
    """The mapping of `system`; its links are written out.

    Raises:
        SystemFileError: a figure that is not at its default has no source.
    """
    document: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "name": system.name}
    document |= {"description": system.description, "device": system.device}
    document["device_type"] = system.device_type
    if system.algorithm is not None:
        document["algorithm"] = system.algorithm
    document |= _figures_out(system, _SYSTEM_FIGURES, system.sources)
    document["levels"] = [
        {"name": level.name, "ranks": level.ranks}
        | _figures_out(level, _LEVEL_FIGURES, level.sources)
        for level in system.levels
    ]
    return document


def _figures_out(
    holder: object, names: tuple[str, ...], sources: Mapping[str, Source]
) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for name in names:
        value = getattr(holder, name)
        default = holder.__dataclass_fields__[name].default  # type: ignore[attr-defined]
        if name not in sources:
            if value == default:
                continue
            raise SystemFileError(f"{name} of {getattr(holder, 'name', '?')} has no source: add it")
        figures[name] = {"value": float(value)} | {
            key: item
            for key in _SOURCE_KEYS
            if (item := getattr(sources[name], key)) not in ("", None)
        }
    return figures


def parse_system(
    document: dict[str, Any], load_link: LoadLink, load_processor: LoadProcessor
) -> System:
    """The system of a mapping; what it says itself goes before what its processor says.

    Raises:
        ValueError, TypeError: it is none; the text names the key.
        SystemFileError: a link or a processor that is not shipped.
    """
    _refuse_unknown(document, _SYSTEM_KEYS, "")
    if document.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(
            f"schema_version is {document.get('schema_version')!r}, and this program reads "
            f"{SCHEMA_VERSION}"
        )
    if "processor" in document:
        document = load_processor(_text(document, "processor")) | document
    levels = document.get("levels") or []
    if not isinstance(levels, list) or not all(isinstance(item, dict) for item in levels):
        raise ValueError("levels must be a list of mappings, innermost first")
    figures, sources = _figures_in(document, _SYSTEM_FIGURES, "")
    for name in ("memory_bandwidth_bytes_per_s", "launch_s"):
        if name not in figures:
            raise ValueError(f"{name} is missing: add it as {{value, kind, source}}")
    return System(
        name=_text(document, "name"),
        device=_text(document, "device"),
        description=str(document.get("description") or ""),
        device_type=cast(DeviceType, str(document.get("device_type", "cuda"))),
        algorithm=None if document.get("algorithm") is None else _text(document, "algorithm"),
        levels=tuple(parse_level(item, load_link) for item in levels),
        sources=sources,
        **figures,
    )


def parse_level(document: dict[str, Any], load_link: LoadLink) -> Level:
    """The level of a mapping; raises as `parse_system` does."""
    ranks = document.get("ranks")
    if isinstance(ranks, bool) or not isinstance(ranks, int):
        raise ValueError(f"ranks of a level is {ranks!r}: give a whole number")
    if "link" in document:
        _refuse_unknown(document, {"link", "ranks"}, "a level with a link")
        return load_link(str(document["link"]), ranks)
    name = _text(document, "name")
    _refuse_unknown(document, {"name", "ranks", *_LEVEL_FIGURES}, f"level {name}")
    figures, sources = _figures_in(document, _LEVEL_FIGURES, f"level {name}: ")
    for required in ("alpha_s", "beta_s_per_byte"):
        if required not in figures:
            raise ValueError(f"level {name}: {required} is missing: add {{value, kind, source}}")
    return Level(name=name, ranks=ranks, sources=sources, **figures)


def _figures_in(
    document: dict[str, Any], names: tuple[str, ...], where: str
) -> tuple[dict[str, float], dict[str, Source]]:
    figures: dict[str, float] = {}
    sources: dict[str, Source] = {}
    for name in names:
        entry = document.get(name)
        if entry is None:
            continue
        if not isinstance(entry, dict) or not {"value", "kind", "source"} <= entry.keys():
            raise ValueError(
                f"{where}{name} must be {{value, kind, source}}: a figure says where it is from"
            )
        _refuse_unknown(entry, {"value", *_SOURCE_KEYS}, f"{where}{name}")
        figures[name] = _number(entry["value"], f"{where}{name}")
        sources[name] = _source(entry, f"{where}{name}")
    return figures, sources


def _source(entry: dict[str, Any], where: str) -> Source:
    error = entry.get("relative_error")
    try:
        return Source(
            kind=entry["kind"],
            source=str(entry["source"]),
            note=str(entry.get("note") or ""),
            relative_error=None if error is None else _number(error, "relative_error"),
        )
    except ValueError as problem:
        raise ValueError(f"{where}: {problem}") from problem


def _number(value: object, what: str) -> float:
    # YAML 1.1 reads 1e-6, without a point, as a string.
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"{what} is {value!r}: give a number")
    try:
        return float(value)
    except ValueError:
        raise ValueError(f"{what} is {value!r}: give a number") from None


def _text(document: dict[str, Any], key: str) -> str:
    value = document.get(key)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{key} is {value!r}: give a text")
    return value


def _refuse_unknown(document: dict[str, Any], known: set[str], where: str) -> None:
    unknown = sorted(str(key) for key in document if key not in known)
    if unknown:
        place = f" in {where}" if where else ""
        raise ValueError(f"{unknown[0]!r}{place} is unknown: use {', '.join(sorted(known))}")
