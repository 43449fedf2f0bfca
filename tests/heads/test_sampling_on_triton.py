"""Heads that sample over the Triton kernels, interpreted: the draws of the reference, at any split.

Operations are asked for by device, so a CPU is given those of CUDA, or the definition in torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flashhead_dist.heads.dense import IndexScan
from flashhead_dist.heads.distribution import closed_form
from flashhead_dist.heads.registry import build_head, emulate_head
from flashhead_dist.heads.sampling import SamplingParameters, choose_tokens, token_log_probs
from flashhead_dist.integrations.transformers_rows import LogitRows
from flashhead_dist.integrations.vllm.rows import know
from flashhead_dist.models import OutputContract, open_model
from flashhead_dist.parallel import TensorParallel
from flashhead_kernels import dispatch

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("a CPU is played as CUDA by the interpreter", allow_module_level=True)

STATES = (0.2 * torch.randn(3, 64, generator=torch.Generator().manual_seed(4))).to(torch.bfloat16)
PLACES = (torch.arange(3) * 7, torch.arange(3) % 2)
KINDS = (
    SamplingParameters(temperature=1.0, seed=2**63 + 5),
    SamplingParameters(temperature=0.6, top_k=5, top_p=0.9),
    SamplingParameters(temperature=1.0, top_p=0.97),
)


def use(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Serve a CPU with `reference` and `sampling`, or with `cuda` and `cuda_sampling`."""
    monkeypatch.setitem(dispatch._MODULES, "cpu", name)
    sampling = "cuda_sampling" if name == "cuda" else "sampling"
    monkeypatch.setitem(dispatch._SAMPLING_MODULES, "cpu", sampling)


def built(name: str, tp_size: int, model: Path, index: Path) -> Any:
    options = {"model": open_model(str(model)), "index_dir": index}
    return emulate_head(name, tp_size=tp_size, **options)


@pytest.mark.parametrize("name", ["flashhead", "dense_local_max"])
def test_draws_are_those_of_the_reference_at_any_split(
    tied_model: Path, tied_index: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    heads = [built(name, tp_size, tied_model, tied_index) for tp_size in (1, 2, 3)]
    for parameters in KINDS:
        use(monkeypatch, "reference")
        wanted = choose_tokens(
            heads[0], STATES, *PLACES, parameters, contract=OutputContract(softcap=20.0)
        )
        use(monkeypatch, "cuda")
        # What the kernels are not asked for again: one split tells of top-k and top-p.
        for head in heads if parameters is KINDS[0] else heads[1:2]:
            found = choose_tokens(
                head, STATES, *PLACES, parameters, contract=OutputContract(softcap=20.0)
            )
            assert torch.equal(found, wanted), (head.tp_size, parameters)


@pytest.mark.parametrize("name", ["flashhead", "dense_local_max", "index_scan"])
def test_log_probs_are_those_of_the_reference(
    tied_model: Path, tied_index: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    tokens = torch.tensor([0, 400, 1012])
    if name == "index_scan":
        model = open_model(str(tied_model))
        single = build_head(
            "flashhead", tp=TensorParallel.single(), model=model, index_dir=tied_index
        )
        heads: list[Any] = [IndexScan(single.tp, single.index)]
    else:
        heads = [built(name, tp_size, tied_model, tied_index) for tp_size in (1, 2)]
    use(monkeypatch, "reference")
    wanted = token_log_probs(
        heads[0], STATES, tokens, temperature=0.7, contract=OutputContract(softcap=20.0)
    )
    use(monkeypatch, "cuda")
    for head in heads:
        found = token_log_probs(
            head, STATES, tokens, temperature=0.7, contract=OutputContract(softcap=20.0)
        )
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)


def test_rows_of_logits_are_those_of_the_reference(
    tied_model: Path, tied_index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head: Any = build_head(
        "flashhead",
        tp=TensorParallel.single(),
        model=open_model(str(tied_model)),
        index_dir=tied_index,
    )
    rows, found = LogitRows(head), []
    for name in ("reference", "cuda"):
        use(monkeypatch, name)
        known = head.tp.run(know(head, STATES[:1], 0.8, softcap=20.0, draws=True))
        retrieved = rows.retrieve(STATES[:1], 0.8)
        found.append(
            (
                closed_form(head, STATES[:1], contract=OutputContract(softcap=20.0)).unnormalized(),
                rows.closed_form(retrieved),
                rows.estimated(retrieved, below_best=True),
                known.logits,
                known.heavy_mass,
                known.rest_mass,
            )
        )
    for wanted, got in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-4)
