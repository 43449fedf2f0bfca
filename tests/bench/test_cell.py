"""When a cell ends: once the median of its times is known to 2 %."""

from __future__ import annotations

import numpy as np
import pytest

from flashhead_dist.bench.cell import median_is_known

DRAW = np.random.default_rng(3)


@pytest.mark.parametrize("number", [0, 1, 7])
def test_few_times_never_suffice(number: int) -> None:
    assert not median_is_known([100.0] * number)


def test_equal_times_suffice_and_a_few_outliers_do_not_matter() -> None:
    assert median_is_known([100.0] * 8)
    assert median_is_known([100.0] * 38 + [9000.0, 8000.0])


@pytest.mark.parametrize("spread", [0.01, 0.2])
def test_the_median_is_known_where_its_interval_is_narrow(spread: float) -> None:
    times = 100 * (1 + spread * DRAW.standard_normal(40))
    assert median_is_known(list(times)) == (spread < 0.05)


def test_what_is_called_known_is_the_median_to_two_percent() -> None:
    """Of 400 cells that ended, nearly all are within 2 % of the true median."""
    errors = []
    for _ in range(400):
        times: list[float] = []
        while len(times) < 400:
            times += list(DRAW.lognormal(0.0, 0.05, 8))
            if median_is_known(times):
                errors.append(abs(np.median(times) - 1.0))
                break
    assert len(errors) == 400
    assert np.mean(np.array(errors) < 0.02) > 0.85
