"""Draws and log-probabilities on a simulated GPU are those of the CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from flashhead_dist.heads.registry import emulate_head
from flashhead_dist.heads.sampling import SamplingParameters, choose_tokens, token_log_probs
from tests.cuda_simulated.conftest import Small

if TYPE_CHECKING:
    from simulated_cuda import SimulatedCuda

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature": {"temperature": 8.0},
    "top-k": {"temperature": 8.0, "top_k": 5},
    "top-p": {"temperature": 8.0, "top_p": 0.9},
    "wide top-p": {"temperature": 60.0, "top_p": 0.99},
}
HEADS = ["flashhead", "dense_local_max"]
BATCH = 3


@pytest.mark.parametrize("positions_on", ["cpu", "cuda"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", HEADS)
def test_a_gpu_draws_the_cpus_tokens(
    cuda: SimulatedCuda, small: Small, name: str, way: str, positions_on: str
) -> None:
    parameters = SamplingParameters(**WAYS[way], seed=7)
    positions, sequences = torch.arange(BATCH) + 11, torch.arange(BATCH)
    states = small.states[:BATCH]
    expected = choose_tokens(small.head(name, "cpu"), states, positions, sequences, parameters)
    found = choose_tokens(
        small.head(name),
        states.cuda(),
        positions.to(positions_on),
        sequences.to(positions_on),
        parameters,
    )
    assert found.is_cuda
    assert torch.equal(found.cpu(), expected)


def test_draws_differ_from_the_best_tokens(small: Small) -> None:
    """Or the test above could not see the noise."""
    head, numbers = small.head("dense_local_max", "cpu"), torch.arange(BATCH)
    drawn = [
        choose_tokens(
            head, small.states[:BATCH], numbers + 11, numbers, SamplingParameters(**way, seed=7)
        )
        for way in (WAYS["temperature"], WAYS["greedy"])
    ]
    assert not torch.equal(*drawn)


def test_emulated_ranks_draw_the_cpus_tokens(cuda: SimulatedCuda, small: Small) -> None:
    numbers, parameters = torch.arange(BATCH), SamplingParameters(temperature=8.0, top_p=0.9)
    drawn = []
    for device in ("cpu", "cuda"):
        head = emulate_head(
            "flashhead", tp_size=2, model=small.model, index_dir=small.index_dir, device=device
        )
        states = small.states[:BATCH].to(device)
        drawn.append(choose_tokens(head, states, numbers, numbers, parameters).cpu())
    assert torch.equal(*drawn)


@pytest.mark.parametrize("name", HEADS)
def test_a_gpu_gives_the_cpus_log_probabilities(
    cuda: SimulatedCuda, small: Small, name: str
) -> None:
    tokens, states = torch.tensor([110, 0, 57]), small.states[:BATCH]
    expected = token_log_probs(small.head(name, "cpu"), states, tokens, temperature=4.0)
    found = token_log_probs(small.head(name), states.cuda(), tokens.cuda(), temperature=4.0)
    assert found.is_cuda
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-4)
