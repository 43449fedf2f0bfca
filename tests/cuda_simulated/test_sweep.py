"""A sweep on one simulated GPU: heads are captured, replayed, and timed by events."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch.distributed import FileStore  # type: ignore[attr-defined]

from flashhead_dist.bench import crossover, memory, wire
from flashhead_dist.bench.cell import Effort
from flashhead_dist.bench.control import Control
from flashhead_dist.bench.environment import decide_setup, make_provenance
from flashhead_dist.bench.records import Record
from flashhead_dist.bench.sweep import Plan, Sweep
from flashhead_dist.evaluate.workload import Workload
from flashhead_dist.parallel import TensorParallel
from flashhead_topology.probe import probe_machine
from tests.cuda_simulated.conftest import Small

if TYPE_CHECKING:
    from simulated_cuda import SimulatedCuda

HEADS = ("dense_local_max", "flashhead", "flashhead_auto", "flashhead_global")
NUM_STATES = 8


class _Silent:
    def stage(self, text: str) -> None:
        """Say nothing."""


@pytest.fixture
def sweep(
    cuda: SimulatedCuda, small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Sweep:
    """Of one rank, with so few rounds and bytes that an interpreter gets through them."""
    monkeypatch.setenv("FLASHHEAD_CACHE", str(tmp_path))
    monkeypatch.setattr(memory, "_CUDA_BYTES", 1 << 16)
    monkeypatch.setattr(crossover, "_ROUNDS", 1)
    monkeypatch.setattr(wire, "_MAX_DEVICE_STEPS", 1)
    setup = decide_setup(
        probe_machine(), local_rank=0, local_world_size=1, threads_per_rank=1, device="cuda",
        heads=HEADS,
    )  # fmt: skip
    states = small.states[:NUM_STATES]
    rows = small.model.read_rows(0, small.model.vocab_size)
    plan = Plan(
        heads=HEADS,
        tp_sizes=(1,),
        batch_sizes=(1, 2),
        dtype=torch.bfloat16,
        effort=Effort(iterations=3, warmup=1, cell_seconds=1.0),
        num_cores=1,
        fit=setup.fit,
    )
    workload = Workload(
        index_hash=None,
        origin="states of a test",
        index_dir=small.index_dir,
        states=states,
        source_ids=torch.zeros(NUM_STATES, dtype=torch.int64),
        sources=("all",),
        dense_ids=(states.float() @ rows.float().T).argmax(1),
    )
    return Sweep(
        plan=plan,
        model=small.model,
        workload=workload,
        control=Control(FileStore(str(tmp_path / "store"), 1), 0, range(1)),
        host="here",
        provenance=make_provenance(
            {"versions": {}, "commit": "abc"}, setup, small.model, index_hash="ff",
            num_probes=None, alpha=None, seed=0, world_size=1,
        ),
        write=lambda record: None,
        progress=_Silent(),
    )  # fmt: skip


def test_a_gpu_is_swept(cuda: SimulatedCuda, sweep: Sweep) -> None:
    found = sweep.run({1: TensorParallel.single("cuda:0")})
    records: dict[tuple[str, int], Record] = {
        (record.head, record.batch_size): record for record in found
    }
    assert set(records) == {(head, batch) for head in HEADS for batch in (1, 2)}
    for record in records.values():
        assert record.measured
        assert record.median_us > 0
    assert records["dense_local_max", 1].top1_agreement == 1
    assert sweep.crossovers.keys() == {1}
    # The head that waits for the host is not captured, and the notes say so.
    assert any("flashhead_global" in note for note in sweep.notes)
    assert torch.cuda.memory_allocated() < 1 << 16
