"""Machines as the cost model knows them: a device, and levels of links around it.

`systems` reads and writes them. Figures are in base units: seconds, bytes, operations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import isfinite
from typing import Literal, get_args

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
