"""The best unprobed cluster's score: every implementation against a float64 reading of the rule.

Mutated to see each fail: probed clusters not taken out, a tie at the threshold forgotten, the slot
left in the key where the id is, one group's key taken for all groups'.
"""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from flashhead_kernels import cpu, reference
from flashhead_kernels.dispatch import ops_for
from flashhead_kernels.keys import EMPTY_KEY, pack_keys, unpack_keys
from flashhead_kernels.shard import IndexShard
from tests.kernels.shards import ALPHA, candidates, make_shard, random_states, select_groups

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPS = pytest.mark.parametrize(
    ("ops", "options"),
    [
        (cpu, {}),
        (cpu, {"between": lambda: None}),
        (reference, {}),
        (ops_for("cuda"), {"launches": 1}),
        (ops_for("cuda"), {"launches": 2}),
    ],
    ids=["cpu", "cpu-in-two", "reference", "triton-1", "triton-2"],
)
# (groups, clusters, tokens, hidden size, bits, scale group, pinned, rows' dtype)
SHAPES = [
    (3, 7, 4, 64, 4, 64, 0, torch.bfloat16),
    (4, 9, 2, 96, 4, 32, 3, torch.float32),
    (3, 5, 1, 48, 8, 16, 1, torch.float16),
    (2, 9, 8, 200, 8, 40, 2, torch.bfloat16),
    (2, 9, 8, 640, 16, 640, 2, torch.bfloat16),
    (2, 32, 4, 640, 4, 64, 1, torch.bfloat16),
]


def placed(ops: ModuleType, shard: IndexShard, states: Tensor) -> tuple[IndexShard, Tensor]:
    """Where these operations take them from."""
    device = "cpu" if ops is cpu else DEVICE
    moved = shard.to(device)
    return moved, states.to(device)


def unprobed(
    ops: ModuleType, shard: IndexShard, states: Tensor, probes: int, **options: Any
) -> Tensor:
    on_device, hidden = placed(ops, shard, states)
    found = candidates(ops, on_device, hidden, probes, need_unprobed=True, **options)
    assert found.unprobed is not None
    assert found.unprobed.shape == (len(states),)
    return found.unprobed.cpu()


def truth(shard: IndexShard, states: Tensor, probes: int) -> Tensor:
    """float64 `[B]`: each group's scores sorted, the first `probes` dropped, the greatest left."""
    scores = reference.score_centroids(states, shard, ALPHA).double()
    left = scores.sort(dim=2, descending=True).values[:, :, probes:]
    return left.flatten(1).amax(1)


@OPS
@pytest.mark.parametrize(("shape", "batch"), [(SHAPES[0], 3), (SHAPES[5], 1)])
def test_it_is_the_best_of_what_was_left(
    ops: ModuleType, options: dict[str, Any], shape: tuple[Any, ...], batch: int
) -> None:
    shard = make_shard(*shape)
    states = random_states(batch, shape[3])
    probes = shape[1] // 2
    scores, ids = unpack_keys(unprobed(ops, shard, states, probes, **options))
    torch.testing.assert_close(scores.double(), truth(shard, states, probes), rtol=1e-5, atol=1e-4)
    assert ids.tolist() == [0] * batch, "no slot is left in the key: ranks must agree on it"


@pytest.mark.parametrize("ops", [cpu, reference])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_best_of_what_was_left_in_any_shape(
    ops: ModuleType, shape: tuple[Any, ...]
) -> None:
    shard = make_shard(*shape)
    for batch in (1, 5):
        states = random_states(batch, shape[3])
        for probes in (1, shape[1] // 2, shape[1] - 1):
            scores, _ = unpack_keys(unprobed(ops, shard, states, probes))
            expected = truth(shard, states, probes)
            torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-4)


@OPS
def test_it_goes_with_k_and_the_log_sum_exp(ops: ModuleType, options: dict[str, Any]) -> None:
    shard, states = placed(ops, make_shard(*SHAPES[0]), random_states(2, 64))
    alone = unprobed(ops, shard, states, 3, **options)
    found = candidates(
        ops, shard, states, 3, k=4, need_logsumexp=True, need_unprobed=True,
                       **options)  # fmt: skip
    plain = candidates(ops, shard, states, 3, k=4, need_logsumexp=True, **options)
    assert found.unprobed is not None
    assert torch.equal(found.unprobed.cpu(), alone)
    assert plain.unprobed is None
    assert torch.equal(found.keys, plain.keys), "asking for more changes no candidate"
    torch.testing.assert_close(found.logsumexp, plain.logsumexp)


@OPS
def test_where_all_are_probed_nothing_is_left(ops: ModuleType, options: dict[str, Any]) -> None:
    shard = make_shard(*SHAPES[0])
    assert unprobed(ops, shard, random_states(2, 64), 7, **options).tolist() == [EMPTY_KEY] * 2


@OPS
@pytest.mark.parametrize("value", [1.0, 0.0, -0.0])
def test_a_tie_at_the_threshold_is_left_too(
    ops: ModuleType, options: dict[str, Any], value: float
) -> None:
    """All scores alike: what is left is as good as what was taken, and that is no near miss."""
    shard = make_shard(2, 16, 4, 64, 4, 64, 0, torch.bfloat16)
    same = replace(
        shard.centroids,
        values=torch.full_like(shard.centroids.values, 0x99),
        scales=torch.ones_like(shard.centroids.scales),
    )
    shard = replace(shard, centroids=same, spread=torch.zeros_like(shard.spread))
    states = torch.full((1, 64), value)
    found = unprobed(ops, shard, states, 3, **options)
    expected = pack_keys(torch.tensor([64 * value]), torch.zeros(1, dtype=torch.int64))
    assert found.tolist() == expected.tolist()


@OPS
def test_clusters_of_pads_are_no_temptation(ops: ModuleType, options: dict[str, Any]) -> None:
    """Their rows are huge; their score is -inf."""
    shard = make_shard(1, 2, 2, 64, 4, 64, 0, torch.bfloat16)
    scores, _ = unpack_keys(unprobed(ops, shard, random_states(2, 64), 1, **options))
    assert scores.tolist() == [float("-inf")] * 2


@pytest.mark.parametrize("ops", [cpu, reference, ops_for("cuda")])
def test_an_empty_batch_leaves_nothing(ops: ModuleType) -> None:
    shard, states = placed(ops, make_shard(*SHAPES[0]), random_states(0, 64))
    found = candidates(ops, shard, states, 2, need_unprobed=True)
    assert found.unprobed is not None
    assert found.unprobed.shape == (0,)


def test_groups_of_one_rank_are_those_of_all_ranks() -> None:
    """A maximum over ranks' keys is the key of one rank that holds all groups, bit for bit."""
    shard = make_shard(6, 16, 2, 96, 4, 32, 1, torch.bfloat16)
    states = random_states(5, 96)
    whole = unprobed(cpu, shard, states, 3)
    parts = []
    for rank in range(4):
        part = select_groups(shard, list(range(rank, 6, 4)))
        parts.append(unprobed(cpu, part, states, 3))
    assert torch.equal(torch.stack(parts).amax(0), whole)
    assert len({int(torch.stack(parts)[:, b].argmax()) for b in range(5)}) > 1
