"""Three ranks of which one is slow: its records name it, and show what the others wait."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import FileStore  # type: ignore[attr-defined]

from flashhead_dist.bench.cell import Effort
from flashhead_dist.bench.control import Control
from flashhead_dist.bench.environment import decide_setup, make_provenance
from flashhead_dist.bench.records import Record, record_from_json
from flashhead_dist.bench.split import Quantiles
from flashhead_dist.bench.sweep import Plan, Sweep
from flashhead_dist.evaluate.workload import Workload
from flashhead_dist.models import open_model
from flashhead_dist.parallel import split_tensor_parallel
from flashhead_topology.machine import Machine
from tests.launch.slow_rank import slow_down

HEADS = ("dense_gather", "flashhead_global")
SLOW_RANK, SLOW_US = 1, 80_000.0
Run = Callable[..., list[Any]]


class _Silent:
    def stage(self, text: str) -> None:
        """Nobody looks."""


def _rank(
    rank: int, world_size: int, folder: str, model_dir: str, index_dir: str, num_cores: int
) -> list[dict[str, Any]]:
    if rank == SLOW_RANK:
        slow_down(SLOW_US / 1e6)
    model = open_model(model_dir)
    machine = Machine("An EPYC", num_cores, 8_000_000_000, "Linux 6.1")
    setup = decide_setup(
        machine, local_rank=rank, local_world_size=world_size, threads_per_rank=1, heads=HEADS
    )
    facts: dict[str, Any] = {"index_hash": "ff", "num_probes": None, "alpha": None, "seed": 0}
    sweep = Sweep(
        plan=Plan(
            heads=HEADS,
            tp_sizes=(world_size,),
            batch_sizes=(1,),
            dtype=torch.bfloat16,
            effort=Effort(iterations=12, warmup=1, cell_seconds=20.0),
            num_cores=num_cores,
            fit=setup.fit,
        ),
        model=model,
        workload=Workload(
            index_hash=None,
            origin="states of a test",
            index_dir=Path(index_dir),
            states=torch.randn(8, 64).to(torch.bfloat16),
            source_ids=torch.zeros(8, dtype=torch.int64),
            sources=("made up",),
            dense_ids=None,
        ),
        control=Control(FileStore(folder, world_size), rank, range(world_size)),
        host="here",
        provenance=make_provenance(
            {"versions": {}, "commit": "abc"}, setup, model, world_size=world_size, **facts
        ),
        write=lambda record: None,
        progress=_Silent(),
    )
    sizes = setup.group_sizes((world_size,), world_size)
    return [asdict(record) for record in sweep.run(split_tensor_parallel(sizes))]


def _records(
    run_ranks: Run, model: Path, index: Path, folder: Path, num_cores: int
) -> dict[str, Record]:
    given = (str(folder / "store"), str(model), str(index), num_cores)
    found = run_ranks(_rank, 3, *given)[0]
    return {record["head"]: record_from_json(record) for record in found}


def _of(record: Record, part: str) -> list[Quantiles]:
    found = record.split.by_rank_us[part]
    assert found is not None
    return found


@pytest.mark.parametrize("num_cores", [4, 2], ids=["together", "alone"])
def test_the_slow_rank_is_named_and_the_others_wait_for_it(
    run_ranks: Run, tied_model: Path, tied_index: Path, tmp_path: Path, num_cores: int
) -> None:
    """Cores are what the plan is told: the ranks fit four, and are replayed in turn on two.

    flashhead_global exchanges twice, and only its first exchange waits: a sum over exchanges that
    is compared between ranks would do as well here, a maximum over steps would not.
    """
    records = _records(run_ranks, tied_model, tied_index, tmp_path, num_cores)
    for head in HEADS:
        record = records[head]
        assert record.measured == (num_cores == 4)
        slow = record.split.slow_rank
        assert slow is not None
        assert slow.rank == SLOW_RANK
        assert slow.excess_us > 0.8 * SLOW_US
        waiting = [quantiles.median for quantiles in _of(record, "waiting")]
        assert waiting[0] > 0.5 * SLOW_US
        assert waiting[2] > 0.5 * SLOW_US
        assert waiting[SLOW_RANK] < 0.25 * SLOW_US
        parts = ("centroids", "candidates", "other")
        compute = [sum(_of(record, part)[rank].median for part in parts) for rank in range(3)]
        assert compute[SLOW_RANK] > SLOW_US
        assert (record.split.by_rank_us["exchange"] is None) == (num_cores == 2)
    centroids, candidates = (_of(records["flashhead_global"], part) for part in parts[:2])
    assert all(quantiles.median > 0 for quantiles in (*centroids, *candidates))
    assert all(quantiles.median == 0 for quantiles in _of(records["dense_gather"], "centroids"))
