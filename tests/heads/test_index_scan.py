"""The dense head over an index's rows: what dense_local_max gives, from the index's own memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from flashhead_dist.heads.base import Head
from flashhead_dist.heads.dense import IndexScan
from flashhead_dist.heads.registry import EmulatedHead, HeadBuilder
from flashhead_dist.heads.sampling import SamplingParameters, choose_tokens, token_log_probs
from flashhead_dist.models import open_model
from flashhead_dist.parallel import TensorParallel


def builders(model: Path, index: Path, tp_size: int, dtype: torch.dtype) -> list[HeadBuilder]:
    return [
        HeadBuilder(
            tp=TensorParallel(tp_rank=rank, tp_size=tp_size),
            model=open_model(str(model)),
            index_dir=index,
            dtype=dtype,
        )
        for rank in range(tp_size)
    ]


def scan_and_dense(
    model: Path, index: Path, tp_size: int, dtype: torch.dtype
) -> tuple[EmulatedHead, EmulatedHead]:
    scans: list[Head] = []
    for builder in builders(model, index, tp_size, dtype):
        flashhead = builder.build("flashhead")
        confirming = builder.build_confirming()
        assert isinstance(confirming, IndexScan)
        assert confirming.rows.data_ptr() == flashhead.shard.rows.data_ptr()  # type: ignore[attr-defined]
        scans.append(confirming)
    dense = [b.build("dense_local_max") for b in builders(model, index, tp_size, dtype)]
    return EmulatedHead(scans, tp_size=tp_size), EmulatedHead(dense, tp_size=tp_size)


def states() -> Tensor:
    return torch.randn(9, 64, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tp_size", [1, 3])
def test_it_gives_the_dense_heads_tokens_and_bits(
    tied_model: Path, tied_index: Path, tp_size: int, dtype: torch.dtype
) -> None:
    """Every row of this model has an equal twin: ties show whether the smaller id wins."""
    scan, dense = scan_and_dense(tied_model, tied_index, tp_size, dtype)
    for k in (1, 5):
        found = scan.forward(states(), k=k, need_logsumexp=True)
        expected = dense.forward(states(), k=k, need_logsumexp=True)
        assert torch.equal(found.token_ids, expected.token_ids)
        assert torch.equal(found.logits, expected.logits)
        torch.testing.assert_close(found.logsumexp, expected.logsumexp)


@pytest.mark.parametrize("parameters", [
    SamplingParameters(temperature=1.0, seed=3),
    SamplingParameters(temperature=0.7, top_k=40, seed=3),
    SamplingParameters(temperature=1.3, top_p=0.8, seed=3),
])  # fmt: skip
def test_it_draws_the_dense_heads_tokens(
    tied_model: Path, tied_index: Path, parameters: SamplingParameters
) -> None:
    scan, dense = scan_and_dense(tied_model, tied_index, 2, torch.float32)
    positions = torch.arange(9)
    for sequence in range(20):
        sequences = torch.full((9,), sequence)
        drawn = [
            choose_tokens(head, states(), positions, sequences, parameters)
            for head in (scan, dense)
        ]
        assert torch.equal(*drawn)


def test_it_gives_the_dense_heads_probabilities(tied_model: Path, tied_index: Path) -> None:
    scan, dense = scan_and_dense(tied_model, tied_index, 2, torch.float32)
    tokens = torch.tensor([0, 1012, 506, 1005, 900, 612, 3, 700, 99])
    torch.testing.assert_close(
        token_log_probs(scan, states(), tokens), token_log_probs(dense, states(), tokens)
    )


def test_dense_rows_that_are_held_anyway_confirm(tied_model: Path, tied_index: Path) -> None:
    (builder,) = builders(tied_model, tied_index, 1, torch.float32)
    builder.build("flashhead")
    builder.build("dense_local_max")
    assert builder.build_confirming().name == "dense_local_max"
