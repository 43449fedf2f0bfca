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
    # Some thirty, at ten seconds of a core each: with the dense head and the tree, a quarter of an
    # hour for a vocabulary of 2^18.
    columns = columns_of(shape.hidden_size, 64)
    whole, fewer = columns[0], columns[min(2, len(columns) - 1)]
    yield from (_family(4, count) for count in columns)
    yield from (_family(2, count) for count in columns[2:])
    yield from (_family(8, count) for count in columns[:2])
    yield _family(16, whole)
    yield from _two_levels(_family(4, whole), 16, (0.5, 0.25))
    yield from _two_levels(_family(4, fewer), 16, (0.5, 0.25))
    yield from _two_levels(_family(2, fewer), 16, (0.5, 0.25))
    yield from (replace(_family(4, count), second_order="blocks") for count in (whole, fewer))
    yield from (_family(4, whole, group_size=size) for size in (32, 128))
    yield _family(4, fewer, group_size=128)
    yield from (_family(8, count, bits=8) for count in (whole, fewer))
    yield _family(16, whole, bits=8)
    yield _family(16, whole, bits=16)


def _family(size: int, columns: int, *, bits: int = 4, group_size: int = 64) -> Family:
    return Family(
        cluster_size=size, centroid_bits=bits, group_size=group_size, centroid_columns=columns
    )


def _two_levels(base: Family, coarse: int, kept: Sequence[float]) -> Iterator[Family]:
    for share in kept:
        yield replace(base, coarse_size=coarse, kept_share=share)
