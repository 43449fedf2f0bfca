"""Which settings are tried, the cheapest to simulate of each kind first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from flashhead_dist.index.options import ALPHAS
from flashhead_dist.tune.measure import CANDIDATES, Choices
from flashhead_dist.tune.points import Family, Shape

MOST_BYTES_SHARE = 0.2
_COLUMN_SHARES = (0.8, 0.6, 0.5, 0.4, 0.3)
"""Of D that centroids keep, rounded to whole scale groups."""
_COARSE = (16, 32)
_KEPT = (0.5, 0.25, 0.125)


def columns_of(hidden_size: int, group_size: int) -> list[int]:
    """Numbers of centroid columns to try, greatest first: D and parts of it."""
    whole = hidden_size // group_size
    groups = {max(1, round(share * whole)) for share in _COLUMN_SHARES}
    return [hidden_size, *(n * group_size for n in sorted(groups, reverse=True) if n < whole)]


def families(shape: Shape, *, quick: bool = False) -> list[Family]:
    """Every family of the grid that reads less than MOST_BYTES_SHARE before any candidate.

    quick: one level of the default size alone.
    """
    candidates = list(_quick(shape) if quick else _all(shape))
    return [
        family
        for family in dict.fromkeys(candidates)
        if shape.hidden_size % family.group_size == 0
        and shape.centroid_share(family) < MOST_BYTES_SHARE
    ]


def choices(num_groups: int, *, quick: bool = False) -> Choices:
    """Values of what a family's points differ in."""
    pins: tuple[tuple[int, int], ...] = ((0, 0), (num_groups, 0))
    if not quick:
        more = ((4 * num_groups, 0), (0, 4 * num_groups), (0, 16 * num_groups))
        pins = (*pins, *more, (num_groups, 4 * num_groups))
    return Choices(
        alphas=ALPHAS,
        candidates=CANDIDATES,
        pins=pins,
        row_bits=(16, 8),
        most_bytes_share=MOST_BYTES_SHARE,
    )


def _quick(shape: Shape) -> Iterator[Family]:
    for columns in columns_of(shape.hidden_size, 64)[:3]:
        yield _family(4, columns)


def _all(shape: Shape) -> Iterator[Family]:
    columns = columns_of(shape.hidden_size, 64)
    for size in (4, 2, 8, 16):
        yield from (_family(size, count) for count in columns)
    for coarse in _COARSE:
        for size in (4, 2):
            for count in (columns[0], *columns[2:3]):
                base = _family(size, count)
                yield from _two_levels(base, coarse, _KEPT)
    for count in (columns[0], *columns[2:3]):
        yield replace(_family(4, count), second_order="blocks")
    for group_size in (32, 128):
        yield from (
            _family(4, n, group_size=group_size)
            for n in columns_of(shape.hidden_size, group_size)[:3]
        )
    for size in (4, 8, 16):
        yield from (_family(size, count, bits=8) for count in columns[:3])
    yield _family(16, columns[0], bits=16)


def _family(size: int, columns: int, *, bits: int = 4, group_size: int = 64) -> Family:
    return Family(
        cluster_size=size, centroid_bits=bits, group_size=group_size, centroid_columns=columns
    )


def _two_levels(base: Family, coarse: int, kept: Sequence[float]) -> Iterator[Family]:
    for share in kept:
        yield replace(base, coarse_size=coarse, kept_share=share)
