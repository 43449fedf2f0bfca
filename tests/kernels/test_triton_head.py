"""The FlashHead kernels under Triton's interpreter against their twin and a float64 truth.

On a machine with CUDA the same tests run on the card.
"""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch

from flashhead_kernels import reference, triton_launch
from flashhead_kernels.dispatch import ops_for
from flashhead_kernels.keys import EMPTY_KEY, unpack_keys
from flashhead_kernels.quantize import TILE, tile_centroids
from flashhead_kernels.shard import IndexShard, Query
from flashhead_kernels.triton_reduce import EMPTY_KEY as TRITON_EMPTY_KEY
from flashhead_kernels.triton_shapes import HeadShape
from tests.kernels.shards import agree, candidates, every_logit, make_shard, random_states

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
cuda: ModuleType = ops_for("cuda")
LAUNCHES = pytest.mark.parametrize("launches", [1, 2])
# (groups, clusters, tokens, hidden size, bits, scale group, pinned, rows' dtype)
SHAPES = [
    (3, 7, 4, 64, 4, 64, 0, torch.bfloat16),
    (4, 9, 2, 96, 4, 32, 3, torch.float32),
    (2, 6, 1, 48, 4, 12, 1, torch.float16),  # rows not of whole words
    (3, 5, 1, 48, 8, 16, 1, torch.float16),
    (2, 9, 8, 200, 8, 40, 2, torch.bfloat16),  # D, words and groups not powers of two
    (2, 9, 8, 640, 16, 640, 2, torch.bfloat16),
    (1, 1, 1, 64, 4, 64, 0, torch.bfloat16),
    (2, 32, 4, 256, 4, 32, 1, torch.bfloat16),  # tiles of sixteen and two segments, as by default
    (3, 16, 2, 96, 4, 32, 0, torch.float32),
    (2, 16, 3, 128, 8, 64, 1, torch.bfloat16),
]


def on_device(shard: IndexShard) -> IndexShard:
    return shard.to(DEVICE)


def compare(shape: tuple[Any, ...], batch: int, probes: int, **options: Any) -> None:
    shard = on_device(make_shard(*shape))
    states = random_states(batch, shape[3]).to(DEVICE)
    launches = options.pop("launches")
    found = candidates(cuda, shard, states, probes, launches=launches, **options)
    agree(found, candidates(reference, shard, states, probes, **options))


@LAUNCHES
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("batch", [1, 3])
def test_kernels_agree_with_their_twin(shape: tuple[Any, ...], batch: int, launches: int) -> None:
    compare(shape, batch, (shape[1] + 1) // 2, k=1, need_logsumexp=True, launches=launches)


@LAUNCHES
@pytest.mark.parametrize("batch", [5, 11])
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[2], SHAPES[8]])
def test_larger_batches_are_quantised_once(
    shape: tuple[Any, ...], batch: int, launches: int
) -> None:
    compare(shape, batch, (shape[1] + 1) // 2, k=1, need_logsumexp=True, launches=launches)


def test_a_batch_above_one_launch_s_rows_takes_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "MAX_ROWS", 4)
    compare(SHAPES[0], 9, 4, k=2, need_logsumexp=True, need_unprobed=True, launches=None)


@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[7], SHAPES[8]])
def test_any_layout_over_a_gpu_gives_the_same_bits(
    shape: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One launch or two, candidates split over programs or not, clusters in larger blocks."""
    shard = on_device(make_shard(*shape))
    states = random_states(2, shape[3]).to(DEVICE)
    whole = candidates(cuda, shard, states, 4, k=4, launches=1)
    layouts = set()
    for processors in (1, 6, 132):
        monkeypatch.setattr(triton_launch, "num_processors", lambda _, n=processors: n)
        plan = triton_launch.CentroidStep(
            states, shard.centroids, HeadShape.of(shard, Query(4, 1.0, k=4))
        ).plan
        layouts.add((plan.splits, plan.block_clusters))
        for launches in (1, 2):
            found = candidates(cuda, shard, states, 4, k=4, launches=launches)
            assert torch.equal(found.keys, whole.keys)
    assert len(layouts) == 3


def test_clusters_that_fill_no_tile_are_padded_to_one() -> None:
    """251 clusters a group, as of Llama-3.2-1B, would otherwise be read a word a line."""
    made = make_shard(2, 19, 2, 64, 4, 32, 1, torch.bfloat16)
    assert made.centroids.tile == 1
    tiled = replace(made, centroids=tile_centroids(made.centroids, pad=True))
    assert tiled.centroids.tile == TILE
    assert tiled.centroids.nbytes == made.centroids.nbytes
    assert torch.equal(tiled.centroids.dequantize(), made.centroids.dequantize())
    states = random_states(3, 64)
    for launches in (1, 2):
        found = candidates(
            cuda,
            on_device(tiled),
            states.to(DEVICE),
            5,
            k=3,
            need_logsumexp=True,
            launches=launches,
        )
        agree(found, candidates(reference, on_device(made), states.to(DEVICE), 5, k=3,
                                                need_logsumexp=True))  # fmt: skip


@LAUNCHES
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[4]])
@pytest.mark.parametrize(("probes", "k"), [(1, 1), (1, 5), (5, 4), (9, 64)])
def test_probes_and_best(shape: tuple[Any, ...], probes: int, k: int, launches: int) -> None:
    compare(shape, 2, probes, k=k, need_logsumexp=True, launches=launches)


@LAUNCHES
def test_probing_everything_is_the_dense_head(launches: int) -> None:
    """The cluster of pads is probed too; its huge rows must not win nor weigh."""
    for shape in (SHAPES[0], SHAPES[5], SHAPES[9]):
        shard = make_shard(*shape)
        states = random_states(3, shape[3])
        logits, ids = every_logit(shard, states)
        found = candidates(
            cuda,
            on_device(shard),
            states.to(DEVICE),
            shape[1],
            k=2,
            need_logsumexp=True,
            launches=launches,
        )
        top = logits.topk(2, dim=1)
        got, got_ids = unpack_keys(found.keys.cpu())
        assert torch.equal(got_ids, ids[top.indices].long())
        torch.testing.assert_close(got.double(), top.values, rtol=1e-5, atol=1e-4)
        truth = logits.logsumexp(1).float()
        assert found.logsumexp is not None
        torch.testing.assert_close(found.logsumexp.cpu(), truth, rtol=1e-5, atol=1e-4)


def tied_shard() -> IndexShard:
    """All rows and so all scores alike; tokens in falling order, so the last one wins."""
    shard = make_shard(2, 16, 4, 64, 4, 64, 1, torch.bfloat16)
    tokens = torch.arange(129, 1, -1).int().view(2, 16, 4).contiguous()
    ones = torch.ones_like
    return replace(
        shard,
        rows=ones(shard.rows),
        token_ids=tokens,
        centroids=replace(shard.centroids, values=torch.full_like(shard.centroids.values, 0x99),
                          scales=ones(shard.centroids.scales)),
        spread=ones(shard.spread),
        pinned_rows=ones(shard.pinned_rows),
        pinned_token_ids=torch.tensor([[500], [400]]).int(),
    )  # fmt: skip


@LAUNCHES
@pytest.mark.parametrize("value", [1.0, 0.0, -0.0, -1.0])
def test_ties_go_to_lower_slots_and_smaller_ids(value: float, launches: int) -> None:
    shard = on_device(tied_shard())
    states = torch.full((1, 64), value, device=DEVICE)
    found = candidates(cuda, shard, states, 3, k=4, need_logsumexp=True, launches=launches)
    # Slots 0 to 2 of each group are probed: ids 129..118 and 65..54.
    assert unpack_keys(found.keys)[1].tolist() == [[54, 55, 56, 57]]
    agree(found, candidates(reference, shard, states, 3, k=4, need_logsumexp=True))


@LAUNCHES
def test_extreme_logits(launches: int) -> None:
    shard = on_device(make_shard(2, 16, 4, 64, 4, 64, 1, torch.bfloat16))
    states = (random_states(2, 64).float() * 1e30).to(DEVICE)
    found = candidates(cuda, shard, states, 5, launches=launches, need_logsumexp=True)
    expected = candidates(reference, shard, states, 5, need_logsumexp=True)
    logits, _ = unpack_keys(found.keys)
    wanted, _ = unpack_keys(expected.keys)
    torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found.logsumexp, expected.logsumexp, rtol=1e-5, atol=1e-4)


@LAUNCHES
def test_nothing_to_choose_gives_empty_keys(launches: int) -> None:
    shard = make_shard(2, 16, 4, 64, 4, 64, 0, torch.bfloat16)
    pads = on_device(replace(shard, token_ids=torch.full_like(shard.token_ids, -1)))
    states = random_states(1, 64).to(DEVICE)
    found = candidates(cuda, pads, states, 2, k=2, need_logsumexp=True, launches=launches)
    assert found.keys.tolist() == [[EMPTY_KEY, EMPTY_KEY]]
    assert found.logsumexp is not None
    assert found.logsumexp.tolist() == [float("-inf")]
    assert TRITON_EMPTY_KEY.value == EMPTY_KEY


def test_an_empty_batch_and_many_best() -> None:
    shard = on_device(make_shard(*SHAPES[0]))
    none = candidates(cuda, shard, random_states(0, 64).to(DEVICE), 2, need_logsumexp=True)
    assert none.keys.shape == (0, 1)
    compare(SHAPES[0], 2, 7, k=70, launches=None)


@pytest.mark.parametrize("shape", [SHAPES[8], SHAPES[3]])
def test_launches_repeat_bit_for_bit(shape: tuple[Any, ...]) -> None:
    """The counters are left as they were found, and both ways give the same bits.

    States alternate, as a reduction before the last part is there would find that of other states,
    and there are three groups: with two, a wrong count mends itself.
    """
    shard = on_device(make_shard(*shape))
    states = random_states(6, shape[3]).to(DEVICE)
    halves = (states[:3], states[3:])
    first = [candidates(cuda, shard, half, 4, need_logsumexp=True, launches=1) for half in halves]
    for launches in (1, 2, 1, 2):
        for half, before in zip(halves, first, strict=True):
            again = candidates(cuda, shard, half, 4, need_logsumexp=True, launches=launches)
            agree(again, candidates(reference, shard, half, 4, need_logsumexp=True))
            assert torch.equal(again.keys, before.keys)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device: programs race only there")
@pytest.mark.parametrize("batch", [1, 8])
def test_a_thousand_repeats_are_identical(batch: int) -> None:
    """128 programs arrive in any order; who is last must not matter, nor what the L2 holds."""
    shard = on_device(make_shard(128, 512, 4, 640, 4, 64, 1, torch.bfloat16))
    states = random_states(batch, 640).to(DEVICE)
    for launches in (1, 2):
        first = candidates(cuda, shard, states, 16, launches=launches, need_logsumexp=True)
        for _ in range(1000):
            again = candidates(cuda, shard, states, 16, launches=launches, need_logsumexp=True)
            assert torch.equal(again.keys, first.keys)
            assert torch.equal(again.logsumexp, first.logsumexp)
