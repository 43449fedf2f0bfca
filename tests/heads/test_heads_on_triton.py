"""Heads over the Triton kernels, interpreted: what a run on CUDA calls, and how it fails.

Operations are asked for by device, so a CPU is given those of CUDA.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from flashhead_dist.heads.base import Want
from flashhead_dist.heads.flashhead import IndexHead
from flashhead_dist.heads.registry import build_head
from flashhead_dist.models import open_model
from flashhead_dist.parallel import TensorParallel
from flashhead_kernels import dispatch

triton_launch = pytest.importorskip("flashhead_kernels.triton_launch")
triton_dense = pytest.importorskip("flashhead_kernels.triton_dense")
if torch.cuda.is_available():
    pytest.skip("a CPU is played as CUDA by the interpreter", allow_module_level=True)

STATES = torch.randn(2, 64, generator=torch.Generator().manual_seed(4)).to(torch.bfloat16)


@pytest.fixture
def heads(tied_model: Path, tied_index: Path) -> dict[str, Any]:
    return {
        name: build_head(
            name,
            tp=TensorParallel.single(),
            model=open_model(str(tied_model)),
            index_dir=tied_index,
        )
        for name in ("flashhead", "flashhead_auto", "flashhead_escalate", "dense_local_max")
    }


@pytest.fixture
def operations_of_cuda(heads: object, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(dispatch._MODULES, "cpu", "cuda")
    yield
    assert dispatch.ops_for("cpu").__name__ == "flashhead_kernels.cuda"


def test_triton_gives_the_tokens_of_the_cpu(
    heads: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    heads["flashhead_auto"].changes_at = (1,)
    want = Want(k=2, logsumexp=True)
    expected = {name: head.serve(STATES, want) for name, head in heads.items()}
    monkeypatch.setitem(dispatch._MODULES, "cpu", "cuda")
    for name, head in heads.items():
        found = head.serve(STATES, want)
        assert torch.equal(found.token_ids, expected[name].token_ids), name
        torch.testing.assert_close(found.logits, expected[name].logits)
        torch.testing.assert_close(found.logsumexp, expected[name].logsumexp, rtol=1e-4, atol=1e-4)


class _Refused:
    """A kernel that does not compile."""

    def __getitem__(self, grid: object) -> Any:
        def launch(*given: object, **constants: object) -> None:
            raise RuntimeError("ptxas refuses")

        return launch


def test_a_kernel_that_does_not_compile_ends_the_step(
    heads: dict[str, Any], operations_of_cuda: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twins in torch could serve instead, and nobody would know what was measured."""
    for name in ("one_launch_kernel", "candidates_kernel", "dots_kernel"):
        monkeypatch.setattr(triton_launch, name, _Refused())
    monkeypatch.setattr(triton_dense, "dense_kernel", _Refused())
    for head in heads.values():
        with pytest.raises(RuntimeError, match="ptxas refuses"):
            head.forward(STATES)
        if isinstance(head, IndexHead):
            many = STATES.repeat(5, 1)  # two launches
            with pytest.raises(RuntimeError, match="ptxas refuses"):
                head.forward(many)
