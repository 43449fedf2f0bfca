"""Fidelity and divergence of a head on a simulated GPU are those on the CPU."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from flashhead_dist.evaluate.divergence import evaluate_divergence
from flashhead_dist.evaluate.fidelity import evaluate_fidelity
from flashhead_dist.evaluate.truth import dense_truth
from tests.cuda_simulated.conftest import Small

if TYPE_CHECKING:
    from simulated_cuda import SimulatedCuda

NUM_STATES = 3


@pytest.mark.parametrize("name", ["flashhead", "dense_local_max"])
def test_fidelity_is_the_cpus(
    cuda: SimulatedCuda,
    small: Small,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    monkeypatch.setenv("FLASHHEAD_CACHE", str(tmp_path))
    states = small.test.subset(torch.arange(NUM_STATES))
    truth = dense_truth(small.model, states.states, progress=False)
    tokens = torch.tensor([110, 0, 57])
    found = []
    for device in ("cpu", "cuda"):
        head = small.head(name, device)
        divergence = evaluate_divergence(
            head, small.model, states.states.to(device), tokens, progress=False
        )
        fidelity = evaluate_fidelity(
            head, states, truth, divergence=divergence, device=device, progress=False
        )
        figures = [*fidelity.by_source, asdict(fidelity)]
        found.append([value for row in figures for value in row.values() if _is_number(value)])
    assert len(found[0]) > 10
    assert found[1] == pytest.approx(found[0], rel=1e-3, abs=1e-4)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)
