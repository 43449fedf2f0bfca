"""Systems of the cost model: a device and the levels of links around it, and their YAML files.

Figures are in base units: seconds, bytes, operations. In a file each names its source:

    memory_bandwidth_bytes_per_s: {value: 3.35e+12, kind: data sheet, source: "https://..."}

A file has figures of its own or names a shipped processor and links:

    processor: h100_sxm
    levels:
      - {link: nvlink_4, ranks: 8}
      - {link: infiniband_ndr, ranks: 1024}
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from math import isfinite
from pathlib import Path
from typing import Any, Literal, cast, get_args

import yaml

from flashhead_topology.machine import DeviceType

SourceKind = Literal["data sheet", "published", "measured", "derived", "assumed"]
"""data sheet: the maker's figure. published: measured by others. measured: by this project, here.
derived: computed from other figures, `note` says how. assumed: nobody said so, `note` says why."""


class SystemFileError(ValueError):
    """A system cannot be found, read or written; the text is one sentence for the user."""


@dataclass(frozen=True)
class Source:
    """Where one figure comes from.

    source: a URL, a command, or the figures that it was derived from.
    relative_error: of a fitted figure, the mean over the points that it was fitted to.
    """

    kind: SourceKind
    source: str
    note: str = ""
    relative_error: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(SourceKind):
            raise ValueError(f"kind {self.kind!r} is none of {', '.join(get_args(SourceKind))}")
        if not self.source.strip():
            raise ValueError("source is empty: give a URL, a command or how it was derived")


@dataclass(frozen=True)
class Level:
    """Links that join `ranks` ranks, all of them inside one unit of this level.

    ranks: the most ranks joined by this level together with those inside it: 8 for the links of a
        node of 8, 1024 for a network of 128 such nodes.
    alpha_s: seconds that one message takes before its first byte arrives, as one step of a ring or
        tree costs it, the library's own work included.
    beta_s_per_byte: seconds a byte in one direction, the inverse of the achieved rate. Of the
        innermost level, of one rank's link; further out, of all links together by which one group
        of the level inside leaves it: of a node's 8 network adapters, an eighth of one's.
    base_s: seconds that a collective costs beside its steps where this is its outermost level.
    one_shot_alpha_s: seconds of an exchange in which every rank writes to every other directly and
        waits once, as through symmetric memory; None where ranks cannot map each other's memory.
    sources: by the name of the figure.
    """

    name: str
    ranks: int
    alpha_s: float
    beta_s_per_byte: float
    base_s: float = 0.0
    one_shot_alpha_s: float | None = None
    sources: Mapping[str, Source] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_name("level", self.name)
        if self.ranks < 2:
            raise ValueError(f"level {self.name} joins {self.ranks} ranks: it needs 2 or more")
        _check_figure("alpha_s", self.alpha_s, least=0.0)
        _check_figure("beta_s_per_byte", self.beta_s_per_byte, least=0.0)
        _check_figure("base_s", self.base_s, least=0.0)
        if self.one_shot_alpha_s is not None:
            _check_figure("one_shot_alpha_s", self.one_shot_alpha_s, least=0.0)


@dataclass(frozen=True, kw_only=True)
class System:
    """One kind of rank, and what joins its ranks, innermost level first.

    memory_bandwidth_bytes_per_s: of one rank's memory, as its maker gives it.
    memory_share: the share of it that a sequential read achieves.
    gather_share: the share of it that a read of scattered rows of one cluster each achieves.
    launch_s: seconds that a kernel costs beside its work.
    peak_flop_per_s: dense bfloat16 operations; None leaves arithmetic out.
    memory_bytes: of one rank; None where not known.
    levels: empty for a single rank.
    device_type: says which kernels a head consists of.
    algorithm: of collectives, one of `collective_cost.ALGORITHMS`; None for the quickest.
    sources: by the name of the figure.
    """

    name: str
    device: str
    memory_bandwidth_bytes_per_s: float
    launch_s: float
    levels: tuple[Level, ...] = ()
    memory_share: float = 1.0
    gather_share: float = 1.0
    peak_flop_per_s: float | None = None
    memory_bytes: float | None = None
    algorithm: str | None = None
    device_type: DeviceType = "cuda"
    description: str = ""
    sources: Mapping[str, Source] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_name("system", self.name)
        _check_figure("memory_bandwidth_bytes_per_s", self.memory_bandwidth_bytes_per_s, above=0.0)
        _check_figure("launch_s", self.launch_s, least=0.0)
        for name in ("memory_share", "gather_share"):
            share = getattr(self, name)
            _check_figure(name, share, above=0.0)
            if share > 1:
                raise ValueError(f"{name} is {share:g}: a share lies between 0 and 1")
        for name in ("peak_flop_per_s", "memory_bytes"):
            value = getattr(self, name)
            if value is not None:
                _check_figure(name, value, above=0.0)
        if self.device_type not in get_args(DeviceType):
            raise ValueError(f"device_type is {self.device_type!r}: choose cpu or cuda")
        sizes = [level.ranks for level in self.levels]
        if any(outer <= inner for inner, outer in pairwise(sizes)):
            raise ValueError(
                f"levels join {', '.join(map(str, sizes))} ranks: each must join more than the "
                "one inside it, innermost first"
            )

    @property
    def max_ranks(self) -> int:
        """Ranks that the levels join."""
        return self.levels[-1].ranks if self.levels else 1

    def levels_for(self, num_ranks: int) -> tuple[Level, ...]:
        """The levels that a group of this many neighbouring ranks crosses; none for one rank.

        Raises:
            ValueError: fewer than one rank, or more than the system joins.
        """
        if num_ranks < 1:
            raise ValueError(f"{num_ranks} ranks: a group has at least one")
        if num_ranks > self.max_ranks:
            raise ValueError(
                f"{num_ranks} ranks are more than the {self.max_ranks} that {self.name} joins: "
                "choose fewer, or a system with an outer level"
            )
        return levels_within(self.levels, num_ranks)


def levels_within(levels: Sequence[Level], num_ranks: int) -> tuple[Level, ...]:
    """The innermost of `levels` that together join `num_ranks` ranks; none for one rank."""
    crossed: list[Level] = []
    joined = 1
    for level in levels:
        if joined >= num_ranks:
            break
        crossed.append(level)
        joined = level.ranks
    return tuple(crossed)


def _check_name(what: str, name: str) -> None:
    if not name or not all(c.isascii() and (c.isalnum() or c in "-_.") for c in name):
        raise ValueError(f"{what} name {name!r} must be of letters, digits, '-', '_' and '.'")


def _check_figure(
    name: str, value: float, *, least: float | None = None, above: float | None = None
) -> None:
    if not isfinite(value):
        raise ValueError(f"{name} is {value:g}: give a finite number")
    if least is not None and value < least:
        raise ValueError(f"{name} is {value:g}: it cannot be below {least:g}")
    if above is not None and value <= above:
        raise ValueError(f"{name} is {value:g}: it must be above {above:g}")


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
    "schema_version", "name", "description", "processor", "device", "device_type", "algorithm",
    "levels", *_SYSTEM_FIGURES,
}  # fmt: skip


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


def _parse_system(document: dict[str, Any]) -> System:
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
        levels=tuple(_parse_level(item) for item in levels),
        sources=sources,
        **figures,
    )


def _parse_level(document: dict[str, Any]) -> Level:
    """The level of a mapping; raises as `_parse_system` does."""
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
        error = entry.get("relative_error")
        try:
            sources[name] = Source(
                kind=entry["kind"],
                source=str(entry["source"]),
                note=str(entry.get("note") or ""),
                relative_error=None if error is None else _number(error, "relative_error"),
            )
        except ValueError as problem:
            raise ValueError(f"{where}{name}: {problem}") from problem
    return figures, sources


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
        return _parse_system(document)
    except (ValueError, TypeError) as error:
        raise SystemFileError(f"{path} is no system: {error}") from error


def load_link(name: str, ranks: int) -> Level:
    """The shipped link `name` as a level that joins `ranks` ranks.

    Raises:
        SystemFileError: no such link, or fewer than 2 ranks.
    """
    document = _read_shipped(_LINKS, name, "link")
    try:
        return _parse_level({"name": name, "ranks": ranks, **document})
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
