"""A step taken apart between centroids and rows, as a profiler asks for it: the same bits."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from flashhead_kernels import cpu, reference
from tests.kernels.shards import candidates, make_shard


@pytest.mark.parametrize("ops", [cpu, reference], ids=["cpu", "reference"])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_step_in_two_parts_gives_the_bits_of_one(ops: ModuleType, threads: int) -> None:
    """Two threads share five groups unevenly, and a wrong stride mixes the batch's rows."""
    shard = make_shard(5, 19, 3, 64, 4, 32, 2, torch.bfloat16)
    states = torch.randn(3, 64, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    calls: list[None] = []
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        whole = candidates(ops, shard, states, 4, k=5, need_logsumexp=True)
        parts = candidates(
            ops, shard, states, 4, k=5, need_logsumexp=True,
            between=lambda: calls.append(None),
        )  # fmt: skip
    finally:
        torch.set_num_threads(before)
    assert len(calls) == 1
    assert torch.equal(whole.keys, parts.keys)
    assert whole.logsumexp is not None
    assert parts.logsumexp is not None
    assert torch.equal(whole.logsumexp, parts.logsumexp)
