"""Quantized centroids: layout, rounding, edges of scale groups."""

from __future__ import annotations

import pytest
import torch

from flashhead_kernels.quantize import (
    TILE,
    quantize_centroids,
    quantize_hidden_states,
    tile_centroids,
)


@pytest.mark.parametrize(("bits", "levels"), [(4, 7), (8, 127)])
@pytest.mark.parametrize(
    ("size", "group_size"), [(64, 64), (640, 64), (96, 32), (48, 2), (200, 40)]
)
def test_rounding_error_is_half_a_step(bits: int, levels: int, size: int, group_size: int) -> None:
    torch.manual_seed(0)
    centroids = torch.randn(3, 5, size) * torch.logspace(-3, 3, size)
    quantized = quantize_centroids(centroids, bits, group_size)
    grouped = centroids.view(3, 5, -1, group_size)
    # bfloat16 keeps 8 bits, so rounding the scale up costs at most one part in 128.
    step = grouped.abs().amax(-1, keepdim=True) / levels * (1 + 2**-7)
    error = (quantized.dequantize().view_as(grouped) - grouped).abs()
    assert bool((error <= step * 0.5001).all())


def test_int4_columns_keep_their_places() -> None:
    """One column at a time: a shifted half or group edge would move the value."""
    size, group_size = 128, 32
    for column in range(size):
        one = torch.zeros(1, size)
        one[0, column] = 3.5
        back = quantize_centroids(one, 4, group_size).dequantize()
        assert back.nonzero().tolist() == [[0, column]]
        assert float(back[0, column]) == pytest.approx(3.5, rel=2**-7)


def test_zero_group_stays_zero_and_16_bits_pass_through() -> None:
    zeros = quantize_centroids(torch.zeros(2, 64), 4, 32)
    assert not zeros.dequantize().any()
    values = torch.randn(2, 64).to(torch.bfloat16)
    assert torch.equal(quantize_centroids(values.float(), 16).dequantize(), values.float())


def test_bytes_count_the_scales() -> None:
    assert quantize_centroids(torch.randn(10, 640), 4, 64).nbytes == 10 * (320 + 10 * 2)
    assert quantize_centroids(torch.randn(10, 640), 16).nbytes == 10 * 640 * 2


@pytest.mark.parametrize(
    ("bits", "group_size", "message"), [(5, 64, "bits"), (4, 3, "group size 3"), (8, 60, "divide")]
)
def test_bad_arguments(bits: int, group_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize_centroids(torch.randn(2, 128), bits, group_size)


def test_non_finite_centroids_are_refused() -> None:
    bad = torch.randn(2, 64)
    bad[1, 3] = torch.inf
    with pytest.raises(ValueError, match="finite"):
        quantize_centroids(bad, 4, 64)


def test_hidden_states_round_to_a_127th_of_their_group() -> None:
    torch.manual_seed(0)
    states = torch.randn(4, 128) * torch.logspace(-2, 2, 128)
    states[2, :64] = 0
    integers, scales = quantize_hidden_states(states, 64)
    back = integers * scales.repeat_interleave(64, dim=1)
    bound = states.abs().view(4, 2, 64).amax(-1).repeat_interleave(64, dim=1) / 127 * 0.5001
    assert bool(((back - states).abs() <= bound + 1e-12).all())


@pytest.mark.parametrize(("bits", "group_size"), [(4, 64), (4, 8), (8, 64), (8, 4)])
def test_tiles_hold_the_same_centroids(bits: int, group_size: int) -> None:
    torch.manual_seed(0)
    plain = quantize_centroids(torch.randn(3, 2 * TILE, 128), bits, group_size)
    tiled = tile_centroids(plain)
    assert tiled.tile == TILE
    assert tiled.values.shape == plain.values.shape
    assert tiled.nbytes == plain.nbytes
    assert not torch.equal(tiled.values, plain.values)
    assert torch.equal(tiled.dequantize(), plain.dequantize())
    assert torch.equal(tiled.integers(), plain.integers())
    again = tile_centroids(tiled)
    assert torch.equal(again.values, tiled.values), "a tile must not be interleaved twice"


def test_lane_of_a_tile_is_its_centroid() -> None:
    """The first four bytes of each of sixteen centroids come first, in the centroids' order."""
    centroids = torch.zeros(TILE, 64)
    centroids[5, 4:8] = 7.0
    tiled = tile_centroids(quantize_centroids(centroids, 8, 64))
    flat = tiled.values.flatten()
    assert flat.nonzero().flatten().tolist() == [4 * (TILE + 5) + i for i in range(4)]


@pytest.mark.parametrize(
    ("clusters", "bits", "group_size"), [(15, 4, 64), (17, 8, 64), (16, 16, 64), (16, 4, 4)]
)
def test_what_does_not_fit_tiles_is_left_alone(clusters: int, bits: int, group_size: int) -> None:
    plain = quantize_centroids(torch.randn(2, clusters, 64), bits, group_size)
    assert tile_centroids(plain) is plain
