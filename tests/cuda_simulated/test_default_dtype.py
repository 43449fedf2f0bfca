"""torch's default dtype changes no answer: vLLM warms a model up under bfloat16."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from flashhead_dist.heads.base import Want
from flashhead_dist.heads.flashhead import FlashHeadAuto
from flashhead_dist.heads.sampling import SamplingParameters, choose_tokens, token_log_probs
from flashhead_dist.index import IndexOptions, build_index
from flashhead_dist.index.shard import read_token_ids
from flashhead_dist.integrations.transformers_rows import LogitRows
from flashhead_dist.integrations.vllm.head import Finish, RowsHead
from flashhead_dist.integrations.vllm.needs import Rest, RowNeed
from flashhead_dist.integrations.vllm.rows import VocabularyMap
from flashhead_kernels import launch_choice
from tests.cuda_simulated.conftest import OPTIONS, Small

if TYPE_CHECKING:
    from simulated_cuda import SimulatedCuda

BATCH = 2
Run = Callable[[Small], Any]


def _serve(name: str, want: Want, batch: int = BATCH) -> Run:
    return lambda small: small.head(name).serve(small.states[:batch].cuda(), want)


def _draw(**parameters: Any) -> Run:
    numbers = torch.arange(BATCH)
    return lambda small: choose_tokens(
        small.head("flashhead"), small.states[:BATCH].cuda(), numbers, numbers,
        SamplingParameters(**parameters),
    )  # fmt: skip


def _log_probs(small: Small) -> Tensor:
    tokens = torch.tensor([110, 57], device="cuda")
    return token_log_probs(small.head("flashhead"), small.states[:BATCH].cuda(), tokens)


def _vllm_rows(rest: Rest) -> Run:
    def run(small: Small) -> Tensor:
        head = small.head("flashhead_auto")
        assert isinstance(head, FlashHeadAuto)
        token_ids, _ = read_token_ids(small.index_dir, head.index.manifest)
        where = VocabularyMap.of(token_ids.cuda(), head.vocab_size)
        rows = RowsHead(head, Finish(torch.float32), where)
        return rows.rows(small.states[:BATCH].cuda(), [RowNeed(rest)] * BATCH)

    return run


def _transformers_rows(small: Small) -> tuple[Tensor, Tensor]:
    rows = LogitRows(small.head("flashhead"))  # type: ignore[arg-type]
    found = rows.retrieve(small.states[:BATCH].cuda(), 2.0)
    return rows.estimated(found, below_best=True), rows.closed_form(found)


RUNS: dict[str, Run] = {
    "flashhead": _serve("flashhead", Want(k=2, logsumexp=True)),
    "flashhead_global": _serve("flashhead_global", Want(logsumexp=True, candidate_mass=True)),
    "flashhead_escalate": _serve("flashhead_escalate", Want()),
    "dense_local_max": _serve("dense_local_max", Want(k=2, logsumexp=True)),
    "dense_allreduce": _serve("dense_allreduce", Want(logsumexp=True)),
    "an empty batch": _serve("flashhead", Want(k=2, logsumexp=True), 0),
    "temperature": _draw(temperature=8.0),
    "top-p": _draw(temperature=60.0, top_p=0.99),
    "log probabilities": _log_probs,
    "vLLM's rows of candidates": _vllm_rows(Rest.NOTHING),
    "vLLM's rows for draws": _vllm_rows(Rest.CLUSTERS),
    "transformers' rows": _transformers_rows,
}


@contextmanager
def bfloat16_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def _tensors(result: Any) -> list[Tensor]:
    parts = result if isinstance(result, tuple) else (result,)
    if not isinstance(result, tuple | Tensor):
        parts = astuple(result)
    return [part.cpu() for part in parts if part is not None]


@pytest.mark.parametrize(("name", "launches"), [*((name, 1) for name in RUNS), ("flashhead", 2)])
def test_bfloat16_by_default_changes_nothing(
    cuda: SimulatedCuda,
    small: Small,
    name: str,
    launches: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(launch_choice.table, "choose", lambda *_: launches)
    expected = _tensors(RUNS[name](small))
    with bfloat16_by_default():
        within = _tensors(RUNS[name](small))
    # Memory that was kept while it lasted serves again.
    after = _tensors(RUNS[name](small))
    for ours in (within, after):
        assert [part.dtype for part in ours] == [part.dtype for part in expected]
        assert all(map(torch.equal, ours, expected))


@pytest.mark.parametrize("columns", [None, 16])
def test_an_index_built_meanwhile_is_the_same(small: Small, tmp_path: Path, columns: int) -> None:
    options = IndexOptions(**OPTIONS | {"centroid_columns": columns, "group_size": 16})

    def build(name: str) -> bytes:
        folder = build_index(
            small.model, options, calibration=small.calibration, test=None, out=tmp_path / name,
            device="cpu", progress=False,
        )  # fmt: skip
        return (folder / "index.safetensors").read_bytes()

    expected = build("float32")
    with bfloat16_by_default():
        assert build("bfloat16") == expected
