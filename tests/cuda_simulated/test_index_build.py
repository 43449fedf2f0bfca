"""An index built on a simulated GPU is the one that the CPU builds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from flashhead_dist.index import IndexOptions, build_index, load_manifest, load_shard
from flashhead_kernels.shard import IndexShard
from tests.cuda_simulated.conftest import OPTIONS, Small

if TYPE_CHECKING:
    from simulated_cuda import SimulatedCuda

CHANGES: dict[str, dict[str, Any]] = {
    "default": {},
    "int8 centroids of 16 columns": {
        "centroid_columns": 16, "group_size": 16, "centroid_bits": 8
    },
    "16-bit centroids": {"centroid_bits": 16},
    "faiss": {"method": "faiss"},
    "unit norm": {"centroid_kind": "unit_norm"},
    "pinned tokens": {"pinned_token_ids": (5, 60, 112)},
}  # fmt: skip


def _build(small: Small, out: Path, device: str, changes: dict[str, Any]) -> Path:
    options = IndexOptions(**OPTIONS | changes)
    few = [part.subset(torch.arange(6)) for part in (small.calibration, small.test)]
    return build_index(
        small.model, options, calibration=few[0], test=few[1], out=out, device=device,
        progress=False,
    )  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_gpu_builds_the_cpus_index(
    cuda: SimulatedCuda, small: Small, tmp_path: Path, name: str
) -> None:
    built = [_build(small, tmp_path / device, device, CHANGES[name]) for device in ("cuda", "cpu")]
    assert cuda.launches
    ours, theirs = (load_shard(folder).shard for folder in built)
    for tensor in ("token_ids", "rows", "pinned_token_ids", "pinned_rows"):
        assert torch.equal(getattr(ours, tensor), getattr(theirs, tensor))
    torch.testing.assert_close(ours.spread, theirs.spread)
    torch.testing.assert_close(ours.centroids.dequantize(), theirs.centroids.dequantize())
    one, two = (load_manifest(folder) for folder in built)
    assert one.alpha == two.alpha
    assert one.fidelity["top1_agreement"] == two.fidelity["top1_agreement"]


def test_an_index_loads_onto_a_gpu(cuda: SimulatedCuda, small: Small) -> None:
    ours, theirs = (
        load_shard(small.index_dir, device=device).shard for device in ("cuda:1", "cpu")
    )
    assert isinstance(ours, IndexShard)
    for tensor in ("token_ids", "rows", "spread", "pinned_token_ids", "pinned_rows"):
        assert getattr(ours, tensor).device == torch.device("cuda:1")
        assert torch.equal(getattr(ours, tensor).cpu(), getattr(theirs, tensor))
