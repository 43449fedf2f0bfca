"""The metric of the hidden states, and centroids rounded for it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flashhead_dist.index import cluster, layout
from flashhead_dist.index.cluster import cluster_space, second_moment
from flashhead_dist.index.layout import describe_clusters, quantize_for_states
from flashhead_kernels.quantize import integer_limit, quantize_centroids

SHAPES = ((64, 64), (96, 32), (200, 40), (48, 2), (128, 128))
"""Hidden sizes and columns a scale; the rounding goes over blocks of 64 columns."""


def _draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _anisotropic(num_states: int, hidden_size: int) -> Tensor:
    """States whose energy falls off over rotated directions, as that of real ones does."""
    rotation: Tensor = torch.linalg.qr(_draw(hidden_size, hidden_size, seed=1)).Q
    return _draw(num_states, hidden_size, seed=2) * torch.logspace(0, -1.5, hidden_size) @ rotation


def _distances(points: Tensor) -> Tensor:
    """Squared distances float64 of all pairs of `points [n, D]`."""
    one, other = torch.combinations(torch.arange(len(points))).T
    return (points[one].double() - points[other].double()).square().sum(1)


def _score_error(exact: Tensor, rounded: Tensor, moment: Tensor) -> float:
    """Mean expected squared error of a score: (c - c')^T A (c - c')."""
    error = (exact - rounded).double().flatten(0, -2)
    return float((error @ moment * error).sum(1).mean())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_second_moment_weighs_directions_not_norms(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = _draw(50, 12).to(dtype)
    states[7] = 0
    expected = torch.zeros(12, 12, dtype=torch.float64)
    for state in states.double():
        expected += torch.outer(state, state) / state.square().sum().clamp(min=1e-300)
    expected /= 50
    monkeypatch.setattr(cluster, "_CHUNK_ROWS", 7)
    moment = second_moment(states)
    assert moment.dtype == torch.float64
    assert torch.allclose(moment, expected, rtol=1e-12, atol=1e-14)
    # Powers of two are exact in any dtype.
    scale = 2.0 ** torch.arange(50).remainder(9).to(dtype).unsqueeze(1)
    assert torch.allclose(second_moment(states * scale), moment, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("exponent", [0.0, 0.7])
def test_without_states_or_exponent_distances_are_euclidean(exponent: float) -> None:
    rows = _draw(300, 48) * torch.linspace(0.1, 3, 48) + 5
    moment = second_moment(_anisotropic(400, 48)) if exponent == 0 else None
    placed = cluster_space(rows, moment, exponent)
    assert placed.shape == (300, 48)
    assert placed.dtype == torch.float32
    assert torch.allclose(_distances(placed), _distances(rows), rtol=1e-4)
    assert float(placed.mean(0).abs().max()) < 1e-4


@pytest.mark.parametrize("exponent", [0.5, 1.0])
def test_distances_are_those_of_the_metric(
    exponent: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "_CHUNK_ROWS", 70)
    rows = (_draw(200, 40) + 1).to(torch.bfloat16)
    moment = second_moment(_anisotropic(500, 40))
    values, vectors = torch.linalg.eigh(moment)
    matrix = vectors @ torch.diag(values**exponent) @ vectors.T
    matrix /= matrix.trace() / 40
    placed = cluster_space(rows, moment, exponent).double()
    one, other = torch.combinations(torch.arange(200)).T
    difference = rows[one].double() - rows[other].double()
    expected = (difference @ matrix * difference).sum(1)
    assert torch.allclose(_distances(placed), expected, rtol=1e-4)
    assert float(placed.mean(0).abs().max()) < 1e-4
    euclidean = difference.square().sum(1)
    assert float((expected / euclidean).log().abs().max()) > 0.5


def test_wide_rows_keep_their_leading_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 300 columns that hardly vary in 44 directions, in one of which they lie far off."""
    monkeypatch.setattr(cluster, "_CHUNK_ROWS", 90)
    scales = torch.cat([torch.ones(256), torch.full((44,), 1e-3)])
    rows = _draw(400, 300) * scales
    rows[:, 299] += 20
    rows = rows @ torch.linalg.qr(_draw(300, 300, seed=1)).Q
    placed = cluster_space(rows, None, 0.7)
    assert placed.shape == (400, cluster.CLUSTER_DIMENSIONS)
    assert torch.allclose(_distances(placed), _distances(rows), rtol=1e-4)


@pytest.mark.parametrize("exponent", [0.0, 0.7])
def test_signs_do_not_depend_on_those_of_the_eigenvectors(
    exponent: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, moment = _draw(300, 24) * torch.linspace(1, 2, 24), second_moment(_anisotropic(400, 24))
    expected = cluster_space(rows, moment, exponent)
    eigh = torch.linalg.eigh
    flips = iter((_draw(24, seed=8).sign(), _draw(24, seed=9).sign()))

    def flipped(matrix: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = eigh(matrix)
        return values, vectors * next(flips)

    monkeypatch.setattr(torch.linalg, "eigh", flipped)
    assert torch.allclose(cluster_space(rows, moment, exponent), expected, atol=1e-4)


@pytest.mark.parametrize(("hidden_size", "group_size"), SHAPES)
@pytest.mark.parametrize("bits", [4, 8])
def test_scores_of_such_states_lose_less_than_by_plain_rounding(
    hidden_size: int, group_size: int, bits: int
) -> None:
    centroids = _draw(3, 50, hidden_size)
    moment = second_moment(_anisotropic(2000, hidden_size))
    plain = quantize_centroids(centroids, bits, group_size)
    better = quantize_for_states(centroids, moment, bits, group_size)
    assert (better.bits, better.group_size, better.hidden_size) == (bits, group_size, hidden_size)
    assert better.scales is not None
    assert plain.scales is not None
    assert torch.equal(better.scales, plain.scales)
    assert better.values.shape == plain.values.shape
    assert better.values.dtype == plain.values.dtype
    assert int(better.integers().abs().max()) <= integer_limit(bits)
    gained = _score_error(centroids, better.dequantize(), moment)
    lost = _score_error(centroids, plain.dequantize(), moment)
    assert gained < 0.6 * lost


def test_states_that_nothing_was_learned_from_lose_little() -> None:
    centroids = _draw(100, 128)
    moment = second_moment(_anisotropic(2000, 128))
    isotropic = torch.eye(128, dtype=torch.float64) / 128
    plain = quantize_centroids(centroids, 4, 64)
    better = quantize_for_states(centroids, moment, 4, 64)
    gained = _score_error(centroids, better.dequantize(), isotropic)
    assert gained < 2.5 * _score_error(centroids, plain.dequantize(), isotropic)


@pytest.mark.parametrize(
    "moment",
    [torch.eye(96, dtype=torch.float64), torch.zeros(96, 96, dtype=torch.float64)],
    ids=["isotropic", "no states"],
)
def test_without_preferred_directions_rounding_is_plain(moment: Tensor) -> None:
    centroids = _draw(70, 96)
    better = quantize_for_states(centroids, moment, 4, 32)
    assert torch.equal(better.values, quantize_centroids(centroids, 4, 32).values)


def _one_column_after_another(centroids: Tensor, moment: Tensor, scales: Tensor) -> Tensor:
    """Integers `[n, D]` by the rule, plainly: a column is rounded to what, with all columns still
    to come, would best make up for the errors of those that are rounded already."""
    moment = moment + 0.01 * moment.diagonal().mean() * torch.eye(len(moment), dtype=torch.float64)
    order = torch.argsort(moment.diagonal(), descending=True, stable=True).tolist()
    rounded = centroids.double().clone()
    integers = torch.zeros_like(rounded)
    for step, column in enumerate(order):
        done, rest = order[:step], order[step:]
        error = (centroids - rounded)[:, done].double()
        made_up = torch.linalg.solve(moment[rest][:, rest], moment[rest][:, done] @ error.T)
        target = centroids[:, column].double() + (made_up[0] if done else 0.0)
        integers[:, column] = (target / scales[:, column]).round().clamp(-7, 7)
        rounded[:, column] = integers[:, column] * scales[:, column]
    return integers


@pytest.mark.parametrize("block_columns", [1, 24, 64])
def test_integers_are_those_of_the_rule(
    block_columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "_BLOCK_COLUMNS", block_columns)
    centroids = _draw(80, 96)
    moment = second_moment(_anisotropic(2000, 96) * torch.linspace(0.3, 2, 96))
    quantized = quantize_for_states(centroids, moment, 4, 32)
    assert quantized.scales is not None
    scales = quantized.scales.double().repeat_interleave(32, dim=1)
    expected = _one_column_after_another(centroids, moment, scales)
    # Float32 may round a tie the other way, and with it what depends on it.
    same = (quantized.integers() == expected).all(1).double().mean()
    assert float(same) > 0.95


def test_zeros_stay_zero_and_disturb_nobody() -> None:
    centroids = _draw(40, 128)
    moment = second_moment(_anisotropic(2000, 128))
    alone = quantize_for_states(centroids[1:], moment, 4, 64).dequantize()
    centroids[0] = 0
    centroids[3, 64:] = 0
    quantized = quantize_for_states(centroids, moment, 4, 64)
    assert not quantized.integers()[0].any()
    assert not quantized.integers()[3, 64:].any()
    found = quantized.dequantize()
    assert bool(torch.isfinite(found).all())
    assert float((found[3, :64] - centroids[3, :64]).abs().max()) < 1
    others = [1, 2, *range(4, 40)]
    assert torch.equal(found[others], alone[[place - 1 for place in others]])


@pytest.mark.parametrize("scale", [1e-38, 1e-20, 1e20, 1e36])
def test_tiny_and_huge_centroids_are_rounded_alike(scale: float) -> None:
    centroids = _draw(40, 64)
    moment = second_moment(_anisotropic(500, 64))
    usual = quantize_for_states(centroids, moment, 8, 64)
    found = quantize_for_states(centroids * scale, moment, 8, 64).dequantize()
    assert bool(torch.isfinite(found).all())
    difference = found.double() / scale - usual.dequantize().double()
    assert float(difference.abs().max()) < 0.2


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_centroids_that_are_not_finite_are_refused(value: float) -> None:
    centroids = _draw(4, 64)
    centroids[2, 5] = value
    with pytest.raises(ValueError, match="finite"):
        quantize_for_states(centroids, torch.eye(64), 4, 64)


def test_spread_is_the_rms_difference_of_logits_of_the_row_that_strays_most() -> None:
    """Against the states themselves; the mean over rows, or Euclid, would give other numbers."""
    rows, states = _draw(96, 12, seed=5), _anisotropic(400, 12)
    unit = torch.nn.functional.normalize(states, dim=1)
    ids = torch.arange(96).view(24, 4).clone()
    ids[3, 2:] = -1
    ids[5] = -1
    means, spread = describe_clusters(rows, ids, second_moment(states))
    for number, members in enumerate(ids):
        real = rows[members[members >= 0]]
        if not len(real):
            assert float(spread[number]) == -torch.inf
            continue
        assert torch.allclose(means[number], real.mean(0), atol=1e-6)
        differences = unit @ (real - real.mean(0)).T
        expected = differences.double().square().mean(0).sqrt().max()
        assert float(spread[number]) == pytest.approx(float(expected), rel=1e-4)


def test_without_states_spread_is_euclidean() -> None:
    rows = _draw(8, 12, seed=7)
    means, spread = describe_clusters(rows, torch.arange(8).view(2, 4))
    strays = (rows.view(2, 4, 12) - means.unsqueeze(1)).norm(dim=2).amax(1)
    assert torch.allclose(spread, strays / 12**0.5, rtol=1e-5)
