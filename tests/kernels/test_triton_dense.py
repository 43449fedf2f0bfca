"""The dense kernel under Triton's interpreter (on the card where there is one) against its twin."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import pytest
import torch

from flashhead_kernels import cpu, reference
from flashhead_kernels.dispatch import ops_for
from flashhead_kernels.keys import pack_keys, unpack_keys
from flashhead_kernels.noise import PLAIN, FinalLogits, GumbelNoise
from tests.kernels.shards import agree

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
cuda: ModuleType = ops_for("cuda")
NOISY = FinalLogits(
    softcap=30.0,
    temperature=0.7,
    noise=GumbelNoise(123456789012, torch.arange(70).int(), torch.arange(70).flip(0)),
)


def compare(states: torch.Tensor, rows: torch.Tensor, final: FinalLogits, k: int) -> None:
    states, rows = states.to(DEVICE), rows.to(DEVICE)
    if final.noise is not None:
        places = (final.noise.positions, final.noise.sequences)
        positions, sequences = (place[: len(states)].to(DEVICE) for place in places)
        final = replace(final, noise=GumbelNoise(final.noise.seed, positions, sequences))
    options = {"k": k, "need_logsumexp": True, "final": final}
    agree(
        cuda.dense_candidates(states, rows, 1000, **options),
        reference.dense_candidates(states, rows, 1000, **options),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("tokens", "size"), [(131, 200), (5, 64), (1, 8)])
@pytest.mark.parametrize("batch", [1, 8, 20, 70])
def test_kernel_agrees_with_its_twin(
    dtype: torch.dtype, tokens: int, size: int, batch: int
) -> None:
    generator = torch.Generator().manual_seed(tokens + batch)
    rows = torch.randn(tokens, size, generator=generator).to(dtype)
    states = torch.randn(batch, size, generator=generator).to(torch.bfloat16)
    compare(states, rows, PLAIN, 1)


@pytest.mark.parametrize("batch", [2, 6])
@pytest.mark.parametrize("k", [1, 5, 64])
@pytest.mark.parametrize("final", [PLAIN, NOISY], ids=["plain", "noisy"])
def test_best_and_final_logits(batch: int, k: int, final: FinalLogits) -> None:
    generator = torch.Generator().manual_seed(k)
    rows = torch.randn(200, 64, generator=generator).to(torch.bfloat16)
    states = torch.randn(batch, 64, generator=generator)
    compare(states, rows, final, k)


@pytest.mark.parametrize("batch", [1, 5])
def test_ties_go_to_smaller_ids_and_zeros_are_one(batch: int) -> None:
    rows = torch.zeros(150, 16)
    rows[77:] = -0.0
    found = cuda.dense_candidates(torch.ones(batch, 16).to(DEVICE), rows.to(DEVICE), 7, k=3)
    assert unpack_keys(found.keys)[1].tolist() == [[7, 8, 9]] * batch


def test_nothing_to_score() -> None:
    rows = torch.randn(10, 16).to(DEVICE)
    assert cuda.dense_candidates(rows[:0], rows, 0, k=2).keys.shape == (0, 2)
    assert cuda.dense_candidates(rows, rows[:0], 0, k=2).keys.shape == (10, 2)
    assert cuda.dense_candidates(rows, rows, 0, k=65).keys.shape == (10, 65)
    with pytest.raises(ValueError, match="k must be at least 1"):
        cuda.dense_candidates(rows, rows, 0, k=0)


@pytest.mark.parametrize("ops", [cuda, cpu], ids=["triton", "cpu"])
@pytest.mark.parametrize("batch", [1, 6, 9])
@pytest.mark.parametrize("pads", [1, 150])
def test_rows_of_tokens_in_any_order(ops: ModuleType, batch: int, pads: int) -> None:
    """A table names the tokens; pads, here the greatest rows, neither win nor weigh."""
    device = DEVICE if ops is cuda else "cpu"
    generator = torch.Generator().manual_seed(pads)
    ids = torch.randperm(700, generator=generator).int()
    rows = torch.randn(700, 32, generator=generator).to(torch.bfloat16)
    states = torch.randn(batch, 32, generator=generator).to(torch.bfloat16)
    ids[:pads] = -1
    rows[:pads] = states[0] * 9
    rows[600] = rows[650]
    table = ids.to(device)
    for k, need in ((1, False), (3, True)):
        found = ops.dense_candidates(
            states.to(device), rows.to(device), 0, k=k, need_logsumexp=need, token_ids=table
        )
        real = ids >= 0
        logits = states.float() @ rows[real].float().T
        expected = pack_keys(logits, ids[real].expand(logits.shape)).topk(k, dim=1).values
        wanted, wanted_ids = unpack_keys(expected)
        got, got_ids = unpack_keys(found.keys.cpu())
        assert torch.equal(got_ids, wanted_ids)
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-4)
        if need:
            truth = logits.double().logsumexp(1).float()
            torch.testing.assert_close(found.logsumexp.cpu(), truth, rtol=1e-5, atol=1e-4)
