"""Rows of logits for transformers and vLLM, made on a simulated GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from flashhead_dist.heads.flashhead import FlashHead, FlashHeadAuto
from flashhead_dist.index.shard import read_token_ids
from flashhead_dist.integrations.transformers_rows import LogitRows
from flashhead_dist.integrations.vllm.head import Finish, RowsHead
from flashhead_dist.integrations.vllm.needs import Rest, RowNeed
from flashhead_dist.integrations.vllm.rows import VocabularyMap
from flashhead_kernels.noise import FinalLogits
from tests.cuda_simulated.conftest import Small

if TYPE_CHECKING:
    from simulated_cuda import SimulatedCuda

DEVICES = ("cpu", "cuda")
BATCH = 3
KINDS = {
    "best": RowNeed(Rest.NOTHING, best_only=True),
    "candidates": RowNeed(Rest.NOTHING),
    "even": RowNeed(Rest.EVEN),
    "drawn": RowNeed(Rest.CLUSTERS),
    "cold": RowNeed(Rest.CLUSTERS, temperature=0.5),
}


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.is_cuda
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-3)


def transformers_rows(small: Small, device: str) -> LogitRows:
    head = small.head("flashhead", device)
    assert isinstance(head, FlashHead)
    return LogitRows(head, FinalLogits(softcap=30.0))


def test_transformers_rows_are_those_of_the_cpu(cuda: SimulatedCuda, small: Small) -> None:
    rows, clusters = torch.tensor([0, 2]), torch.tensor([3, 5])
    made: list[list[Tensor]] = []
    for device in DEVICES:
        logits = transformers_rows(small, device)
        found = logits.retrieve(small.states[:BATCH].to(device), 2.0)
        opened = logits.open_clusters(found, rows.to(device), clusters.to(device), exact=False)
        greedy = logits.retrieve(small.states[:BATCH].to(device), greedy=True)
        made.append(
            [
                logits.estimated(found, below_best=True),
                logits.closed_form(found),
                logits.estimated(greedy, below_best=False),
                *opened,
                logits.choose(small.states[:1].to(device)),
            ]
        )
    for expected, found in zip(*made, strict=True):
        assert_close(found, expected)


def rows_head(small: Small, device: str) -> RowsHead:
    head = small.head("flashhead_auto", device)
    assert isinstance(head, FlashHeadAuto)
    token_ids, _ = read_token_ids(small.index_dir, head.index.manifest)
    where = VocabularyMap.of(token_ids.to(device), head.vocab_size)
    return RowsHead(head, Finish(torch.float32, softcap=30.0, scale=0.5), where)


@pytest.mark.parametrize("kind", KINDS)
def test_vllm_rows_of_a_kind_are_those_of_the_cpu(
    cuda: SimulatedCuda, small: Small, kind: str
) -> None:
    needs = [KINDS[kind]] * BATCH
    made = [
        rows_head(small, device).rows(small.states[:BATCH].to(device), needs) for device in DEVICES
    ]
    assert_close(made[1], made[0])


def test_vllm_rows_of_several_kinds_are_those_of_the_cpu(cuda: SimulatedCuda, small: Small) -> None:
    needs = [KINDS["best"], KINDS["drawn"], KINDS["best"]]
    made = [
        rows_head(small, device).rows(small.states[:BATCH].to(device), needs) for device in DEVICES
    ]
    assert_close(made[1], made[0])


def test_vllms_dense_rows_are_those_of_the_cpu(cuda: SimulatedCuda, small: Small) -> None:
    made = [rows_head(small, device).dense(small.states[:BATCH].to(device)) for device in DEVICES]
    assert_close(made[1], made[0])
