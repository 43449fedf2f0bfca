"""What can be chosen, and the bytes that one row's step then reads.

V vocabulary, D hidden size, G probing groups; C clusters of S tokens with m-column centroids.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from flashhead_dist.index.options import IndexOptions

SecondOrder = Literal["spread", "blocks"]
BLOCK_EDGES = (0, 1, 4, 16, 48, 96, 192, 384)
"""First axis of each block of `blocks`; the last block ends at D."""
_ID_BYTES = 4
_SCALE_BYTES = 2
_PROJECTION_BYTES = 4
ROW_GROUP = 64
"""Columns of an int8 row that share a scale."""
RESCORED = 2
"""Candidates of each group that are scored again by their own rows, where rows are int8."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """Choices that share one simulation; its points differ in alpha, probes, pins and row bits."""

    cluster_size: int
    centroid_bits: int
    group_size: int
    centroid_columns: int
    """m: leading axes that centroids keep (`index.axes`); D keeps all, as they are."""
    second_order: SecondOrder = "spread"
    """What alpha multiplies: one spread a cluster, or one for each block of axes."""
    coarse_size: int = 0
    """Tokens of a coarse cluster of the first of two levels; 0: one level."""
    kept_share: float = 1.0
    """Coarse clusters of each group whose children are scored."""

    @property
    def levels(self) -> int:
        return 2 if self.coarse_size else 1

    @property
    def key(self) -> str:
        """A name that no other family has."""
        levels = f"_of{self.coarse_size}x{self.kept_share:g}" if self.coarse_size else ""
        return (
            f"S{self.cluster_size}_int{self.centroid_bits}g{self.group_size}"
            f"_m{self.centroid_columns}_{self.second_order}{levels}"
        )

    @property
    def label(self) -> str:
        """What to call it in a table."""
        bits = "bf16" if self.centroid_bits == 16 else f"int{self.centroid_bits}/{self.group_size}"
        words = [f"S{self.cluster_size}", bits, f"m{self.centroid_columns}"]
        if self.coarse_size:
            words.append(f"{self.kept_share:g} of {self.coarse_size}s")
        if self.second_order != "spread":
            words.append(self.second_order)
        return " ".join(words)


@dataclass(frozen=True, kw_only=True)
class Point(Family):
    """One setting of every parameter."""

    alpha: float
    probes_per_group: int
    learned_pins: int = 0
    """Tokens that calibration states miss, always scored."""
    frequent_pins: int = 0
    """The tokenizer's most frequent tokens, always scored."""
    row_bits: int = 16
    """8: candidates are scored by int8 rows, and the best of each group again by their own rows."""

    @classmethod
    def of(cls, family: Family, **choices: Any) -> Point:
        return cls(**asdict(family), **choices)


@dataclass(frozen=True)
class Shape:
    """What bytes depend on beside the choices."""

    vocab_size: int
    hidden_size: int
    num_groups: int

    @property
    def dense_bytes(self) -> int:
        """Of an output embedding in bfloat16."""
        return 2 * self.vocab_size * self.hidden_size

    def num_clusters(self, cluster_size: int) -> int:
        options = IndexOptions(cluster_size=cluster_size, num_groups=self.num_groups)
        return options.num_clusters(self.vocab_size)

    def bytes_read(self, point: Point) -> int:
        """Weight bytes that the step of one row reads, over all ranks.

        Counted as `IndexManifest.bytes_share` does: centroids with scales, what the second-order
        term needs, the projection where centroids have fewer columns, and rows and ids of
        candidates and pinned tokens.
        """
        read = self._first_stage_bytes(point)
        candidates = point.probes_per_group * self.num_groups * point.cluster_size
        pinned = point.learned_pins + point.frequent_pins
        full_row = 2 * self.hidden_size + _ID_BYTES
        if point.row_bits == 16:
            return read + (candidates + pinned) * full_row
        row = self.hidden_size + _SCALE_BYTES * (self.hidden_size // ROW_GROUP) + _ID_BYTES
        rescored = RESCORED * self.num_groups * 2 * self.hidden_size
        return read + candidates * row + rescored + pinned * full_row

    def bytes_share(self, point: Point) -> float:
        """`bytes_read` over those of the dense head in bfloat16."""
        return self.bytes_read(point) / self.dense_bytes

    def centroid_share(self, family: Family) -> float:
        """What is read before any candidate, over the bytes of the dense head."""
        return self._first_stage_bytes(family) / self.dense_bytes

    def _first_stage_bytes(self, family: Family) -> int:
        clusters, each = self.num_clusters(family.cluster_size), self._centroid_bytes(family)
        read = clusters * each
        if family.coarse_size:
            coarse = self.num_clusters(family.coarse_size)
            read = (coarse + round(family.kept_share * clusters)) * each
        if family.centroid_columns < self.hidden_size:
            # The projection of the state, and the mean that is taken off the centroids.
            read += _PROJECTION_BYTES * self.hidden_size * (family.centroid_columns + 1)
        return read

    def _centroid_bytes(self, point: Family) -> int:
        columns = point.centroid_columns
        scales = 0 if point.centroid_bits == 16 else _SCALE_BYTES * columns // point.group_size
        second = 4 if point.second_order == "spread" else 2 * len(BLOCK_EDGES)
        return columns * point.centroid_bits // 8 + scales + second


def index_options(point: Point, hidden_size: int, num_groups: int) -> IndexOptions | None:
    """Options of the real index that is `point`; None where the head cannot run it.

    Pinned tokens are not among them: they are named when the index is built.
    """
    if point.levels > 1 or point.second_order != "spread":
        return None
    choices: dict[str, Any] = {
        "cluster_size": point.cluster_size,
        "centroid_bits": point.centroid_bits,
        "group_size": point.group_size,
        "num_groups": num_groups,
        "alpha": point.alpha,
    }
    # The options that all of an index's own columns and bits are without.
    further = {
        "centroid_columns": (point.centroid_columns, hidden_size),
        "row_bits": (point.row_bits, 16),
    }
    choices |= {name: value for name, (value, usual) in further.items() if value != usual}
    if not choices.keys() <= {field.name for field in fields(IndexOptions)}:
        return None
    return IndexOptions(**choices)
