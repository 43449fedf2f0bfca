"""Exchanges on real gloo ranks, their account, and their emulation in one process."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from flashhead_dist import parallel
from flashhead_dist.errors import UserError
from flashhead_dist.integrations import deepspeed
from flashhead_dist.parallel import (
    Exchange,
    Operation,
    Steps,
    TensorParallel,
    TorchCalls,
    gloo_ring_sum,
    run_in_lock_step,
    split_tensor_parallel,
    world_tensor_parallel,
)
from flashhead_kernels.keys import pack_keys, unpack_keys
from flashhead_topology.links import payload_bytes

WORLD_SIZE = 5
TP_SIZES = (1, 2, 3, 5)
SUM_SHAPES = ((3,), (1, 1000), (4, 33333), (700_001,), (3_000_001,))
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
Run = Callable[..., list[Any]]


def _keys(rank: int) -> torch.Tensor:
    """Row 0: equal logits, smallest id on the last rank. Row 1: negative. Row 2: -0.0 against 0."""
    logits = torch.tensor([[1.5], [-1.0 - rank], [-0.0 if rank else 0.0]])
    ids = torch.tensor([[100 - rank], [rank], [50 - rank]])
    return pack_keys(logits, ids)


def _summands(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    draw = torch.Generator().manual_seed(1000 + rank)
    return (torch.randn(shape, generator=draw) * 10.0 ** (rank % 3)).to(dtype)


def _rank_collectives(rank: int, world_size: int) -> dict[str, Any]:
    result: dict[str, Any] = {"rank": world_tensor_parallel().tp_rank}
    for tp_size, tp in split_tensor_parallel(TP_SIZES).items():
        if tp is None:
            continue
        result[f"max{tp_size}"] = tp.all_reduce_max(_keys(rank))
        result[f"after_max{tp_size}"] = (tp.payload_bytes, tp.sent_bytes, tp.num_collectives)
        tp.reset()
        result[f"gather{tp_size}"] = tp.all_gather(torch.full((2, 3), rank, dtype=torch.bfloat16).T)
        # torch 2.11 has the older name only.
        with mock.patch.object(dist, "all_gather_single", None, create=True):
            result[f"older{tp_size}"] = tp.all_gather(torch.tensor([rank]))
        result[f"after_gather{tp_size}"] = (tp.payload_bytes, tp.sent_bytes, tp.num_collectives)
        result[f"empty{tp_size}"] = tp.all_gather(torch.empty(0, 4)).shape
        result[f"objects{tp_size}"] = tp.gather_objects({"rank": rank})
        tp.reset()
        tp.barrier()
        if rank == tp_size - 1:
            time.sleep(0.3)
        tp.all_reduce_max(torch.zeros(1, dtype=torch.int64))
        result[f"waited{tp_size}"] = tp.communication_s
        for shape in SUM_SHAPES:
            for dtype in DTYPES:
                result[f"sum{tp_size}{shape}{dtype}"] = tp.all_reduce_sum(
                    _summands(rank, shape, dtype)
                )
    return result


@pytest.fixture(scope="module")
def ranks(run_ranks: Run) -> list[dict[str, Any]]:
    return run_ranks(_rank_collectives, WORLD_SIZE)


@pytest.mark.parametrize("tp_size", TP_SIZES)
def test_max_of_packed_keys_is_the_argmax_with_ties_to_the_smallest_id(
    ranks: list[dict[str, Any]], tp_size: int
) -> None:
    for rank in range(tp_size):
        logits, ids = unpack_keys(ranks[rank][f"max{tp_size}"])
        assert logits[:, 0].tolist() == [1.5, -1.0, 0.0]
        assert ids[:, 0].tolist() == [100 - (tp_size - 1), 0, 50 - (tp_size - 1)]


def test_argmax_over_gathered_float_logits_would_break_ties_by_rank() -> None:
    """The likely bug: rank order in place of token order."""
    logits, ids = unpack_keys(torch.stack([_keys(rank) for rank in range(3)]))
    winner = logits.argmax(0)
    assert ids.gather(0, winner.unsqueeze(0))[0, 0, 0] == 100
    assert unpack_keys(torch.stack([_keys(rank) for rank in range(3)]).amax(0))[1][0, 0] == 98


@pytest.mark.parametrize("tp_size", TP_SIZES)
def test_gather_is_in_rank_order_and_takes_strided_tensors(
    ranks: list[dict[str, Any]], tp_size: int
) -> None:
    expected = torch.arange(tp_size, dtype=torch.bfloat16)[:, None, None].expand(tp_size, 3, 2)
    for rank in range(tp_size):
        assert torch.equal(ranks[rank][f"gather{tp_size}"], expected)
        assert ranks[rank][f"older{tp_size}"][:, 0].tolist() == list(range(tp_size))
        assert ranks[rank][f"empty{tp_size}"] == (tp_size, 0, 4)
        assert ranks[rank][f"objects{tp_size}"] == [{"rank": r} for r in range(tp_size)]


@pytest.mark.parametrize("tp_size", TP_SIZES)
def test_payload_is_the_buffer_and_ring_bytes_are_what_a_rank_sends(
    ranks: list[dict[str, Any]], tp_size: int
) -> None:
    reduced, gathered = 3 * 8, 6 * 2 + 8
    for rank in range(tp_size):
        if tp_size == 1:
            assert ranks[rank]["after_max1"] == ranks[rank]["after_gather1"] == (0, 0, 0)
            continue
        assert ranks[rank][f"after_max{tp_size}"] == (
            reduced, pytest.approx(2 * reduced * (tp_size - 1) / tp_size), 1
        )  # fmt: skip
        assert ranks[rank][f"after_gather{tp_size}"] == (
            gathered * tp_size, gathered * (tp_size - 1), 2
        )  # fmt: skip


@pytest.mark.parametrize("tp_size", [2, 3, 5])
def test_communication_time_includes_waiting_for_the_slowest_rank(
    ranks: list[dict[str, Any]], tp_size: int
) -> None:
    assert ranks[0][f"waited{tp_size}"] > 0.2
    assert ranks[tp_size - 1][f"waited{tp_size}"] < ranks[0][f"waited{tp_size}"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SUM_SHAPES)
@pytest.mark.parametrize("tp_size", [2, 3, 5])
def test_emulated_sum_is_gloos_to_the_last_bit(
    ranks: list[dict[str, Any]], tp_size: int, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    parts = torch.stack([_summands(rank, shape, dtype) for rank in range(tp_size)])
    emulated = gloo_ring_sum(parts)
    for rank in range(tp_size):
        assert torch.equal(ranks[rank][f"sum{tp_size}{shape}{dtype}"], emulated)


def test_a_sum_in_rank_order_would_differ_from_gloos() -> None:
    parts = torch.stack([_summands(rank, (1, 1000), torch.bfloat16) for rank in range(3)])
    in_rank_order = (parts[0] + parts[1]) + parts[2]
    assert not torch.equal(gloo_ring_sum(parts), in_rank_order)


def test_a_group_of_one_makes_no_call() -> None:
    tp = TensorParallel.single()
    keys = _keys(0)
    assert tp.all_reduce_max(keys) is keys
    assert tp.all_gather(keys).shape == (1, 3, 1)
    assert (tp.payload_bytes, tp.num_collectives, tp.communication_s) == (0, 0, 0.0)


def test_a_place_without_a_group_refuses_to_communicate() -> None:
    with pytest.raises(RuntimeError, match="no process group"):
        TensorParallel(tp_rank=1, tp_size=2).all_reduce_max(_keys(0))
    with pytest.raises(ValueError, match="tp_rank 2"):
        TensorParallel(tp_rank=2, tp_size=2)


def test_more_ranks_than_were_started_is_a_users_mistake() -> None:
    with pytest.raises(UserError, match=r"tp_size 2 .*--nproc-per-node"):
        split_tensor_parallel([1, 2])


@pytest.mark.parametrize("name", ["all_gather_into_tensor", "all_gather_single"])
def test_all_gather_calls_whichever_name_torch_has(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gather(gathered: torch.Tensor, tensor: torch.Tensor, group: Any) -> None:
        gathered.copy_(tensor.repeat(2))

    monkeypatch.setattr(parallel, "dist", SimpleNamespace(**{name: gather}))
    gathered = torch.zeros(4)
    TorchCalls().all_gather(gathered, torch.tensor([1.0, 2.0]), None)
    assert gathered.tolist() == [1, 2, 1, 2]


def test_a_deepspeed_that_knows_no_name_of_torchs_all_gather_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """DeepSpeed 0.19 looks for the older name alone, and without it gathers nothing."""
    comm = SimpleNamespace(
        has_all_gather_into_tensor=lambda: False,
        all_gather_into_tensor=lambda *arguments, **options: None,
    )
    monkeypatch.setattr(deepspeed, "import_deepspeed", lambda: SimpleNamespace(comm=comm))
    with pytest.raises(UserError, match="update deepspeed"):
        deepspeed.DeepSpeedCalls().all_gather(torch.zeros(2), torch.zeros(1), None)


def test_payload_counts_the_whole_gathered_buffer() -> None:
    assert payload_bytes(Operation.GATHER, 10, 4) == 40
    assert payload_bytes(Operation.MAX, 10, 4) == 10
    assert payload_bytes(Operation.SUM, 10, 1) == 0


def _two_rounds(rank: int) -> Steps[int]:
    first = yield Exchange(Operation.MAX, torch.tensor([rank]))
    second = yield Exchange(Operation.GATHER, first + rank)
    return int(second.sum())


def test_lock_step_answers_every_round_for_all_ranks() -> None:
    assert run_in_lock_step([_two_rounds(rank) for rank in range(3)]) == [9, 9, 9]


def test_lock_step_refuses_ranks_that_would_hang() -> None:
    def leaves_early() -> Steps[int]:
        yield Exchange(Operation.MAX, torch.tensor([0]))
        return 0

    with pytest.raises(RuntimeError, match="different exchanges"):
        run_in_lock_step([_two_rounds(0), leaves_early()])
