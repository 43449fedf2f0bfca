"""The settings that tuning tries, and the bytes that one row's step then reads.

A `Family` shares one simulation; its `Setting`s differ in alpha, probes, pinned tokens and row
bits. V vocabulary, D hidden size, G probing groups; C clusters of S tokens with m-column centroids.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

from flashhead_dist.index.options import ALPHAS, IndexOptions

MAX_BYTES_SHARE = 0.2
"""Settings that read a larger share of the dense head's bytes are left out."""
ROW_GROUP = 64
"""Columns of an int8 row that share a scale."""
RESCORED = 2
"""Candidates of each group that are scored again by their exact rows, where rows are int8."""
_CANDIDATES = (
    *(1024, 1536, 2048, 3072, 4096, 5120, 6144, 7168, 8192, 9216, 10240, 11264, 12288),
    *(14336, 16384, 20480, 24576, 32768),
)
"""Candidate rows that are tried for a vocabulary of 2^18; others in proportion."""
_VOCABULARY = 1 << 18
_COLUMN_SHARES = (0.8, 0.6, 0.5, 0.4, 0.3)
"""Of D that centroids keep, rounded to whole scale groups."""
_ID_BYTES = 4
_SCALE_BYTES = 2
_PROJECTION_BYTES = 4
_SPREAD_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class Family:
    """Choices that share one simulation."""

    cluster_size: int
    centroid_bits: int
    group_size: int
    centroid_columns: int
    """m: leading axes that centroids keep (`index.layout.leading_axes`); D keeps all, as is."""

    @property
    def key(self) -> str:
        """A name that no other family has; journals and `--only` use it."""
        return (
            f"S{self.cluster_size}_int{self.centroid_bits}g{self.group_size}"
            f"_m{self.centroid_columns}_spread"
        )

    @property
    def label(self) -> str:
        """The name in tables."""
        bits = "bf16" if self.centroid_bits == 16 else f"int{self.centroid_bits}/{self.group_size}"
        return f"S{self.cluster_size} {bits} m{self.centroid_columns}"

    def index_options(self, shape: Shape, **choices: Any) -> IndexOptions:
        """Options of an index of this family."""
        fewer = self.centroid_columns < shape.hidden_size
        return IndexOptions(
            cluster_size=self.cluster_size,
            centroid_bits=self.centroid_bits,
            group_size=self.group_size,
            centroid_columns=self.centroid_columns if fewer else None,
            num_groups=shape.num_groups,
            **choices,
        )


@dataclass(frozen=True, kw_only=True)
class Setting(Family):
    """One choice of every parameter."""

    alpha: float
    probes_per_group: int
    learned_pins: int = 0
    """Always scored: tokens that calibration states miss."""
    frequent_pins: int = 0
    """Always scored: the tokenizer's most frequent tokens."""
    row_bits: int = 16
    """8: candidates are scored by int8 rows, and the best of each group again by exact rows. No
    head runs that."""

    @classmethod
    def of(cls, family: Family, **choices: Any) -> Setting:
        return cls(**asdict(family), **choices)

    @classmethod
    def of_record(cls, record: dict[str, Any]) -> Setting:
        """The setting that a record of a run describes."""
        return cls(**{field.name: record[field.name] for field in fields(cls)})


@dataclass(frozen=True)
class Shape:
    """What bytes depend on beside the choices."""

    vocab_size: int
    hidden_size: int
    num_groups: int

    def num_clusters(self, cluster_size: int) -> int:
        options = IndexOptions(cluster_size=cluster_size, num_groups=self.num_groups)
        return options.num_clusters(self.vocab_size)

    def bytes_share(self, setting: Setting) -> float:
        """Weight bytes that one row's step reads on all ranks, over those of a bf16 dense head.

        Counted as `IndexManifest.bytes_share` does: centroids with scales and spread, the
        projection where centroids have fewer columns, rows and ids of candidates and pinned tokens.
        """
        candidates = setting.probes_per_group * self.num_groups * setting.cluster_size
        pinned = setting.learned_pins + setting.frequent_pins
        exact_row = 2 * self.hidden_size + _ID_BYTES
        read = self._centroid_bytes(setting) + pinned * exact_row
        if setting.row_bits == 16:
            read += candidates * exact_row
        else:
            row = self.hidden_size + _SCALE_BYTES * (self.hidden_size // ROW_GROUP) + _ID_BYTES
            read += candidates * row + RESCORED * self.num_groups * 2 * self.hidden_size
        return read / (2 * self.vocab_size * self.hidden_size)

    def centroid_share(self, family: Family) -> float:
        """Bytes read before any candidate, over those of a bf16 dense head."""
        return self._centroid_bytes(family) / (2 * self.vocab_size * self.hidden_size)

    def _centroid_bytes(self, family: Family) -> int:
        columns = family.centroid_columns
        scales = 0 if family.centroid_bits == 16 else _SCALE_BYTES * columns // family.group_size
        each = columns * family.centroid_bits // 8 + scales + _SPREAD_BYTES
        read = self.num_clusters(family.cluster_size) * each
        if columns < self.hidden_size:
            # The projection of the state, and the mean that is subtracted from the centroids.
            read += _PROJECTION_BYTES * self.hidden_size * (columns + 1)
        return read


@dataclass(frozen=True)
class SearchSpace:
    """Values of what the settings of a family differ in."""

    alphas: tuple[float, ...]
    candidates: tuple[int, ...]
    pins: tuple[tuple[int, int], ...]
    """(learned, frequent) pinned tokens."""
    row_bits: tuple[int, ...]

    def probes(self, family: Family, shape: Shape) -> list[int]:
        """Probes per group, ascending, that give about the candidates, and fewer than all."""
        unit = shape.num_groups * family.cluster_size
        scale = shape.vocab_size / _VOCABULARY
        clusters = shape.num_clusters(family.cluster_size) // shape.num_groups
        wanted = {max(1, round(rows * scale / unit)) for rows in self.candidates}
        return sorted(p for p in wanted if p < clusters)


def search_space(num_groups: int, *, quick: bool = False) -> SearchSpace:
    """What the settings of each family differ in."""
    pins: tuple[tuple[int, int], ...] = ((0, 0), (num_groups, 0))
    if not quick:
        more = ((4 * num_groups, 0), (0, 4 * num_groups), (0, 16 * num_groups))
        pins = (*pins, *more, (num_groups, 4 * num_groups))
    return SearchSpace(ALPHAS, _CANDIDATES, pins, row_bits=(16, 8))


def families(shape: Shape, *, quick: bool = False) -> list[Family]:
    """Every family that reads less than MAX_BYTES_SHARE before any candidate.

    quick: the default cluster size alone.
    """
    candidates = list(_quick(shape) if quick else _all(shape))
    return [
        family
        for family in dict.fromkeys(candidates)
        if shape.hidden_size % family.group_size == 0
        and family.centroid_columns % family.group_size == 0
        and shape.centroid_share(family) < MAX_BYTES_SHARE
    ]


def _columns(hidden_size: int, group_size: int) -> list[int]:
    """Numbers of centroid columns to try, greatest first: D and parts of it."""
    total = hidden_size // group_size
    groups = {max(1, round(share * total)) for share in _COLUMN_SHARES}
    return [hidden_size, *(n * group_size for n in sorted(groups, reverse=True) if n < total)]


def _quick(shape: Shape) -> Iterator[Family]:
    for columns in _columns(shape.hidden_size, 64)[:3]:
        yield _family(4, columns)


def _all(shape: Shape) -> Iterator[Family]:
    # Ten seconds of a core each: with the dense head and the tree, ten minutes for 2^18 tokens.
    columns = _columns(shape.hidden_size, 64)
    most, fewer = columns[0], columns[min(2, len(columns) - 1)]
    yield from (_family(4, count) for count in columns)
    yield from (_family(2, count) for count in columns[2:])
    yield from (_family(8, count) for count in columns[:2])
    yield _family(16, most)
    yield from (_family(4, most, group_size=size) for size in (32, 128))
    yield _family(4, fewer, group_size=128)
    yield from (_family(8, count, bits=8) for count in (most, fewer))
    yield _family(16, most, bits=8)
    yield _family(16, most, bits=16)


def _family(size: int, columns: int, *, bits: int = 4, group_size: int = 64) -> Family:
    return Family(
        cluster_size=size, centroid_bits=bits, group_size=group_size, centroid_columns=columns
    )
