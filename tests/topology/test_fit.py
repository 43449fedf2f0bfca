"""A fit gives back the constants that times were made from, and says how far off it is."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flashhead_topology.links import Sample, collective_time_s, fit_level, predict_s
from flashhead_topology.systems import Level

SIZES = [8, 64, 4096, 1 << 15, 1 << 18, 1 << 21, 1 << 24]
ETHERNET = Level("network", 64, 120e-6, 8e-9, base_s=60e-6)


def made_up(level: Level, algorithm: str | None, tp_sizes: tuple[int, ...] = (2,)) -> list[Sample]:
    """Times of the model itself."""
    return [
        replace(sample, seconds=predict_s(sample, level, algorithm))
        for tp_size in tp_sizes
        for operation in ("all_reduce", "all_gather", "send_recv")
        for size in SIZES
        for sample in [Sample(operation, size, tp_size, 1.0)]
    ]


@pytest.mark.parametrize("algorithm", [None, "ring", "gloo_ring"])
@pytest.mark.parametrize("tp_sizes", [(2,), (2, 4)])
def test_constants_come_back(algorithm: str | None, tp_sizes: tuple[int, ...]) -> None:
    samples = made_up(ETHERNET, algorithm, tp_sizes)
    fit = fit_level(samples, name="network", ranks=64, algorithm=algorithm)
    assert fit.level.alpha_s == pytest.approx(ETHERNET.alpha_s, rel=1e-3)
    assert fit.level.beta_s_per_byte == pytest.approx(ETHERNET.beta_s_per_byte, rel=1e-3)
    assert fit.level.base_s == pytest.approx(ETHERNET.base_s, rel=1e-2)
    assert fit.mean_relative_error() < 1e-3
    assert fit.level.ranks == 64


def test_small_messages_count_as_much_as_large_ones() -> None:
    """Absolute residuals would give alpha up for a slow run of the largest message."""
    samples = made_up(ETHERNET, "gloo_ring")
    samples = [
        replace(s, seconds=1.3 * s.seconds) if s.payload_bytes == SIZES[-1] else s for s in samples
    ]
    fit = fit_level(samples, name="network", ranks=2, algorithm="gloo_ring")
    assert fit.level.alpha_s == pytest.approx(ETHERNET.alpha_s, rel=0.1)


def test_errors_are_relative_signed_and_by_operation() -> None:
    exact = made_up(ETHERNET, "ring")
    samples = [
        replace(s, seconds=s.seconds / 2) if s.operation == "send_recv" else s for s in exact
    ]
    fit = fit_level(samples, name="network", ranks=2, algorithm="ring")
    assert fit.mean_relative_error("send_recv") > fit.mean_relative_error("all_reduce") > 0
    signed = [r.relative_error for r in fit.residuals if r.sample.operation == "send_recv"]
    assert min(signed) > 0
    with pytest.raises(ValueError, match="nothing was fitted to one_shot"):
        fit.mean_relative_error("one_shot")


def test_no_constant_is_below_zero() -> None:
    """A larger message that is quicker by chance must not make bandwidth negative."""
    samples = [Sample("all_gather", 8, 2, 200e-6), Sample("all_gather", 4096, 2, 150e-6)]
    level = fit_level(samples, name="host", ranks=2, algorithm="gloo_ring").level
    assert min(level.alpha_s, level.beta_s_per_byte, level.base_s) >= 0
    assert collective_time_s("all_gather", 8, tp_size=2, levels=[level]) > 0


def test_one_shot_samples_give_their_own_constant_only() -> None:
    samples = made_up(ETHERNET, None)
    shots = [Sample("one_shot", 1000, 4, 9e-6 + 3 * 1000 * ETHERNET.beta_s_per_byte)]
    with_shots = fit_level([*samples, *shots], name="node", ranks=4).level
    assert with_shots.one_shot_alpha_s == pytest.approx(9e-6, rel=1e-3)
    without = fit_level(samples, name="node", ranks=4).level
    assert without == replace(with_shots, one_shot_alpha_s=None)


@pytest.mark.parametrize(
    "samples",
    [
        [],
        [Sample("all_gather", 8, 2, 1e-4), Sample("all_reduce", 8, 2, 1e-4)],
        [Sample("all_gather", 8, 2, 1e-4), Sample("all_gather", 64, 1, 1e-4)],
        [Sample("all_gather", 8, 2, 1e-4), Sample("all_gather", 64, 2, 0.0)],
    ],
)
def test_samples_that_say_too_little_are_refused(samples: list[Sample]) -> None:
    with pytest.raises(ValueError, match=r"two payloads or more|says nothing"):
        fit_level(samples, name="host", ranks=2)
