"""Logits themselves from Triton, interpreted, against the reference and a float64 truth.

On a machine with CUDA the same tests run on the card.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

from flashhead_kernels import reference
from flashhead_kernels.dispatch import ops_for
from flashhead_kernels.keys import unpack_keys
from flashhead_kernels.quantize import Projection, quantize_centroids
from tests.kernels.shards import ALPHA, make_shard, random_states
from tests.kernels.test_triton_head import DEVICE, SHAPES, on_device

pytest.importorskip("flashhead_kernels.cuda")
cuda: ModuleType = ops_for("cuda")


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("batch", [1, 3])
def test_rows_are_scored_as_in_the_reference(shape: tuple[Any, ...], batch: int) -> None:
    shard = on_device(make_shard(*shape))
    rows = shard.rows.flatten(0, 1)
    states = random_states(batch, shape[3]).to(DEVICE)
    generator = torch.Generator().manual_seed(batch)
    for count in (1, 5):
        chosen = torch.randint(-1, len(rows), (batch, count), generator=generator).to(DEVICE)
        found = cuda.score_rows(states, rows, chosen.int())
        close(found, reference.score_rows(states, rows, chosen))
        truth = torch.einsum("bd,bnsd->bns", states.double(), rows[chosen.clamp(min=0)].double())
        close(found, truth.masked_fill((chosen < 0)[..., None], float("-inf")).float())
        ids = shard.token_ids.flatten(0, 1)
        keys = cuda.probed_candidates(states, rows, ids, chosen, k=3)
        wanted = reference.probed_candidates(states, rows, ids, chosen, k=3)
        assert torch.equal(unpack_keys(keys)[1], unpack_keys(wanted)[1])


@pytest.mark.parametrize(
    ("shape", "batch"), [*((shape, 2) for shape in SHAPES[:7]), (SHAPES[9], 1), (SHAPES[3], 9)]
)
def test_centroids_are_scored_as_in_the_reference(shape: tuple[Any, ...], batch: int) -> None:
    shard = on_device(make_shard(*shape))
    states = random_states(batch, shape[3]).to(DEVICE)
    close(
        cuda.centroid_dots(states, shard.centroids),
        reference.centroid_dots(states, shard.centroids),
    )
    for alpha in (0.0, ALPHA):
        close(
            cuda.score_centroids(states, shard, alpha),
            reference.score_centroids(states, shard, alpha),
        )


def test_projected_centroids() -> None:
    generator = torch.Generator().manual_seed(0)
    centroids = quantize_centroids(torch.randn(3, 7, 32, generator=generator), 8, 16)
    projection = Projection(
        torch.randn(32, 48, generator=generator), torch.randn(48, generator=generator)
    )
    moved = type(centroids)(**{**vars(centroids), "projection": projection}).to(DEVICE)
    states = random_states(5, 48).to(DEVICE)
    close(cuda.centroid_dots(states, moved), reference.centroid_dots(states, moved))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("tokens", "size"), [(131, 48), (5, 200), (1, 8)])
@pytest.mark.parametrize("batch", [1, 3, 20])
def test_every_logit(dtype: torch.dtype, tokens: int, size: int, batch: int) -> None:
    generator = torch.Generator().manual_seed(tokens + batch)
    rows = torch.randn(tokens, size, generator=generator).to(dtype).to(DEVICE)
    states = random_states(batch, size).to(DEVICE)
    found = cuda.score_all(states, rows)
    close(found, (states.double() @ rows.double().T).float())


@pytest.mark.parametrize("value", [1e30, -1e30, 0.0])
def test_extreme_values_stay_what_they_are(value: float) -> None:
    shard = on_device(make_shard(*SHAPES[7]))
    states = torch.full((2, shard.rows.shape[-1]), value, device=DEVICE)
    table = shard.rows.flatten(0, 1)
    every = torch.arange(len(table), device=DEVICE).expand(2, -1)
    truth = (states.double() @ table.flatten(0, 1).double().T).float()
    for found in (
        cuda.score_rows(states, table, every).flatten(1),
        cuda.score_all(states, table.flatten(0, 1)),
    ):
        torch.testing.assert_close(found, truth, rtol=1e-3, atol=1e-4)


def test_nothing_to_score() -> None:
    shard = on_device(make_shard(*SHAPES[0]))
    rows = shard.rows.flatten(0, 1)
    none = random_states(0, 64).to(DEVICE)
    assert cuda.score_rows(none, rows, torch.zeros(0, 3, dtype=torch.int32)).shape == (0, 3, 4)
    assert cuda.centroid_dots(none, shard.centroids).shape == (0, 3, 7)
    assert cuda.score_all(none, rows.flatten(0, 1)).shape == (0, 84)
