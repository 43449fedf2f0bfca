"""How predicted is held against measured in the validation over shaped networks."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.topology.shaped.comparison import (
    Cell,
    by_kind,
    calibrated_alike,
    calibrated_on,
    crossover,
    crossovers,
    mean_error,
)


def cell(
    head: str, batch_size: int, measured_s: float, predicted_s: float, payload: int = 8192
) -> Cell:
    return Cell("net", 2, 2, head, batch_size, payload, measured_s, predicted_s)


def test_errors_do_not_cancel() -> None:
    """One cell 50 % too high and one 50 % too low are off by 50 %, not by nothing."""
    cells = [cell("flashhead", 1, 1.0, 1.5), cell("flashhead", 2, 1.0, 0.5)]
    assert mean_error(cells) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="no cell"):
        mean_error([])


def test_cells_are_told_apart_by_the_hosts_of_their_constants() -> None:
    """A prediction from fewer hosts that passed for one from as many would hide its error."""
    four = replace(cell("flashhead", 1, 1.0, 1.0), num_hosts=4)
    cells = [cell("flashhead", 1, 1.0, 1.0), four, replace(four, calibrated_hosts=4)]
    assert calibrated_alike(cells) == [cells[0], cells[2]]
    assert calibrated_on(cells, 2) == cells[:2]


def test_kinds_are_by_payload_and_operation() -> None:
    cells = [
        cell("dense_gather", 1, 1.0, 1.0, payload=4097),
        cell("dense_local_max", 1, 1.0, 1.0, payload=8192),
        cell("flashhead", 1, 1.0, 1.0, payload=4096),
    ]
    assert {kind: mine[0].head for kind, mine in by_kind(cells).items()} == {
        "all_gather": "dense_gather",
        "all_reduce": "dense_local_max",
        "small": "flashhead",
    }


def test_a_crossover_lies_between_the_sizes_around_it() -> None:
    keys_s = {4: 8.0, 16: 8.0, 64: 8.0}
    # On logarithmic axes 2 -> 32 crosses 8 half-way from 4 to 16.
    assert crossover({4: 2.0, 16: 32.0, 64: 500.0}, keys_s) == pytest.approx(8.0)
    assert crossover({4: 9.0, 16: 32.0, 64: 500.0}, keys_s) is None
    assert crossover({4: 1.0, 16: 2.0, 64: 3.0}, keys_s) is None
    # Few keys take fewer messages than many: the last turn is the one that stays.
    assert crossover({4: 9.0, 16: 2.0, 64: 32.0}, keys_s) == pytest.approx(32.0)


def test_predicted_and_measured_crossovers_are_told_apart() -> None:
    gather = [cell("dense_gather", b, b / 4, b / 8) for b in (4, 16, 64, 256)]
    keys = [cell("flashhead", b, 4.0, 4.0) for b in (4, 16, 64, 256)]
    measured, predicted = crossovers([*gather, *keys])
    assert measured == pytest.approx(16.0)
    assert predicted == pytest.approx(32.0)
