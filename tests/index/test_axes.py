"""Leading axes: no other coordinates of their number score centroids closer to h . c."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flashhead_dist.index.cluster import second_moment
from flashhead_dist.index.layout import LeadingAxes, centroid_covariance, leading_axes

D, C, N = 24, 400, 300


@pytest.fixture
def states_and_centroids() -> tuple[Tensor, Tensor]:
    """States with energy along few directions, and centroids that vary along others."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(N, D, generator=generator) * torch.logspace(1, -1, D)
    scales = torch.logspace(-1, 1, D)[torch.randperm(D, generator=generator)]
    centroids = torch.randn(C, D, generator=generator) * scales + 3.0
    return torch.nn.functional.normalize(states, dim=1), centroids


def error_of(axes: LeadingAxes, states: Tensor, centroids: Tensor) -> float:
    centred = centroids - centroids.mean(0)
    scores = (states @ axes.to_state) @ (centred @ axes.to_centroid).T
    return float((scores - states @ centred.T).square().mean())


def test_all_axes_score_exactly(states_and_centroids: tuple[Tensor, Tensor]) -> None:
    states, centroids = states_and_centroids
    _, covariance = centroid_covariance(centroids)
    axes = leading_axes(covariance, second_moment(states), D)
    assert error_of(axes, states, centroids) < 1e-8


def test_fewer_axes_are_the_best_of_their_number(
    states_and_centroids: tuple[Tensor, Tensor],
) -> None:
    # The likely bug: axes of the states alone, or of the centroids alone. Both are worse.
    states, centroids = states_and_centroids
    _, covariance = centroid_covariance(centroids)
    moment = second_moment(states)
    best = error_of(leading_axes(covariance, moment, 6), states, centroids)
    centred = centroids - centroids.mean(0)
    exact = states @ centred.T
    _, values, _ = torch.linalg.svd(exact)
    assert best == pytest.approx(float(values[6:].square().sum()) / exact.numel(), rel=1e-3)
    for matrix in (moment.float(), covariance.float()):
        along = torch.linalg.eigh(matrix)[1][:, -6:]
        assert error_of(LeadingAxes(along, along), states, centroids) > 1.2 * best


def test_centroids_vary_alike_and_the_moment_is_that_of_projected_states(
    states_and_centroids: tuple[Tensor, Tensor],
) -> None:
    states, centroids = states_and_centroids
    mean, covariance = centroid_covariance(centroids)
    moment = second_moment(states)
    axes = leading_axes(covariance, moment, 8)
    placed = (centroids - mean) @ axes.to_centroid
    torch.testing.assert_close(placed.T @ placed / C, torch.eye(8), atol=1e-3, rtol=0)
    projected = states @ axes.to_state
    torch.testing.assert_close(
        axes.moment(moment).float(), projected.T @ projected / N, atol=1e-5, rtol=1e-4
    )


def test_flat_directions_and_no_states_are_no_trouble() -> None:
    centroids = torch.zeros(10, 4)
    centroids[:, 0] = torch.arange(10.0)
    _, covariance = centroid_covariance(centroids)
    axes = leading_axes(covariance, None, 3)
    states = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    assert error_of(axes, states, centroids) < 1e-6
    for values in vars(leading_axes(torch.zeros(4, 4), None, 2)).values():
        assert torch.isfinite(values).all()


def test_more_axes_than_columns_are_refused() -> None:
    with pytest.raises(ValueError, match="5 axes"):
        leading_axes(torch.eye(4), None, 5)
