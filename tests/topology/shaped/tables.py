"""The validation as Markdown: errors, crossovers and constants, one row a network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from flashhead_topology.systems import System
from tests.topology.shaped.comparison import (
    Cell,
    by_kind,
    calibrated_alike,
    calibrated_on,
    crossovers,
    mean_error,
)

_KINDS = ("all_reduce", "all_gather", "small")


_FEWEST = 2
"""Hosts of the smaller calibration, which predicts the larger networks as well."""

_Networks = Iterator[tuple[str, int, int, list[Cell]]]


def tables(cells: Sequence[Cell], systems: Mapping[tuple[str, int], System]) -> str:
    """All four tables. systems: by link and the number of hosts that it was calibrated on."""
    parts = [_errors(cells), _crossovers(cells), _constants(systems), _sizes(cells)]
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


def _networks(cells: Sequence[Cell]) -> _Networks:
    def key(cell: Cell) -> tuple[str, int, int]:
        return cell.network, cell.num_hosts, cell.calibrated_hosts

    for found in dict.fromkeys(key(cell) for cell in cells):
        yield *found, [cell for cell in cells if key(cell) == found]


def _errors(cells: Sequence[Cell]) -> Iterator[str]:
    yield "| link | hosts | constants from | all-reduce > 4 KB | all-gather > 4 KB | up to 4 KB |"
    yield "|---|---|---|---|---|---|"

    def row(mine: Sequence[Cell]) -> str:
        found = by_kind(mine)
        return " | ".join(
            f"{100 * mean_error(found[kind]):.1f} % of {len(found[kind])}"
            if kind in found
            else "none"
            for kind in _KINDS
        )

    for name, hosts, calibrated, mine in _networks(cells):
        yield f"| {name} | {hosts} | {calibrated} | {row(mine)} |"
    yield f"| **all** | | as many | {row(calibrated_alike(cells))} |"
    yield f"| **all** | | {_FEWEST} | {row(calibrated_on(cells, _FEWEST))} |"


def _crossovers(cells: Sequence[Cell]) -> Iterator[str]:
    yield "| link | hosts | constants from | measured crossover, rows | predicted | factor |"
    yield "|---|---|---|---|---|---|"
    for name, hosts, calibrated, mine in _networks(cells):
        measured, predicted = crossovers(mine)
        if measured is None or predicted is None:
            said = [
                "outside" if value is None else f"{value:.0f}" for value in (measured, predicted)
            ]
            yield f"| {name} | {hosts} | {calibrated} | {said[0]} | {said[1]} | - |"
            continue
        factor = max(measured / predicted, predicted / measured)
        yield (
            f"| {name} | {hosts} | {calibrated} | {measured:.1f} | {predicted:.1f} | {factor:.2f} |"
        )


def _constants(systems: Mapping[tuple[str, int], System]) -> Iterator[str]:
    yield "| link as set | hosts | alpha, us | rate, Mbit/s | base, us | fit's mean error |"
    yield "|---|---|---|---|---|---|"
    for (name, hosts), system in systems.items():
        level = system.levels[-1]
        error = level.sources["alpha_s"].relative_error or 0.0
        yield (
            f"| {name} | {hosts} | {level.alpha_s * 1e6:.0f} | "
            f"{8e-6 / level.beta_s_per_byte:.0f} | {level.base_s * 1e6:.0f} | {100 * error:.1f} % |"
        )


def _sizes(cells: Sequence[Cell]) -> Iterator[str]:
    yield (
        "| link | hosts | constants from | head | batch | payload, bytes | measured, ms | "
        "predicted, ms | error |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    for cell in cells:
        yield (
            f"| {cell.network} | {cell.num_hosts} | {cell.calibrated_hosts} | {cell.head} | "
            f"{cell.batch_size} | {cell.payload_bytes:,} | {cell.measured_s * 1e3:.2f} | "
            f"{cell.predicted_s * 1e3:.2f} | {100 * cell.relative_error:+.0f} % |"
        )
