"""Processors without the instruction for byte products must get the same bits."""

from __future__ import annotations

from types import SimpleNamespace

import numba
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from flashhead_kernels import llvm_dots
from flashhead_kernels.cpu import flat, make_query
from flashhead_kernels.quantize import TILE, quantize_centroids, tile_centroids

SIZE, GROUP_SIZE = 192, 64


@pytest.fixture(params=["as the processor has them", "without byte products"])
def features(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param.startswith("without"):
        none = SimpleNamespace(get_host_cpu_features=dict)
        monkeypatch.setattr(llvm_dots, "llvm", none)


def _truth(bits: int) -> tuple[torch.Tensor, NDArray[np.float32]]:
    centroids = torch.randn(TILE, SIZE, generator=torch.Generator().manual_seed(bits))
    quantized = quantize_centroids(centroids, bits, GROUP_SIZE)
    state = torch.randn(1, SIZE, generator=torch.Generator().manual_seed(9))
    (_, integers, _, factors, *_), *_ = make_query(state, quantized, 0.0)
    rounded = torch.from_numpy(integers).double().view(-1, GROUP_SIZE)
    rounded = (rounded * torch.from_numpy(factors).double().unsqueeze(1)).flatten()
    return state, (quantized.dequantize().double() @ rounded).float().numpy()


@pytest.mark.parametrize("bits", [4, 8])
def test_tile(features: None, bits: int) -> None:
    state, truth = _truth(bits)
    centroids = torch.randn(TILE, SIZE, generator=torch.Generator().manual_seed(bits))
    tiled = tile_centroids(quantize_centroids(centroids, bits, GROUP_SIZE))
    query, values, scales, _ = make_query(state, tiled, 0.0)
    dot = llvm_dots.tile_dot_int4 if bits == 4 else llvm_dots.tile_dot_int8

    @numba.njit
    def run(values, scales, integers, starts, factors, scores, groups, group_size):  # type: ignore[no-untyped-def]
        dot(values, 0, scales, 0, integers, 0, starts, 0, factors, 0, scores, 0, groups, group_size)

    scores = np.empty(TILE, np.float32)
    run(values, scales, *query[1:4], scores, SIZE // GROUP_SIZE, GROUP_SIZE)
    np.testing.assert_allclose(scores, truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
def test_four_centroids(features: None, bits: int) -> None:
    state, truth = _truth(bits)
    centroids = torch.randn(TILE, SIZE, generator=torch.Generator().manual_seed(bits))
    plain = quantize_centroids(centroids, bits, GROUP_SIZE)
    query, *_ = make_query(state, plain, 0.0)
    dot = llvm_dots.dot_int4_4 if bits == 4 else llvm_dots.dot_int8_4

    @numba.njit
    def run(values, scales, integers, starts, factors, groups, group_size):  # type: ignore[no-untyped-def]
        return dot(values, 0, scales, 0, integers, 0, starts, 0, factors, 0, groups, group_size)

    assert plain.scales is not None
    four = run(flat(plain.values), flat(plain.scales), *query[1:4], SIZE // GROUP_SIZE, GROUP_SIZE)
    np.testing.assert_allclose(np.array(four), truth[:4], rtol=1e-5, atol=1e-5)
