"""A whole sweep on real ranks: groups, replayed compute, counted bytes, agreement, errors."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import FileStore  # type: ignore[attr-defined]

from flashhead_dist.bench.cell import Effort
from flashhead_dist.bench.control import Control
from flashhead_dist.bench.environment import decide_setup, make_provenance
from flashhead_dist.bench.records import Record
from flashhead_dist.bench.sweep import Plan, Sweep, batches_of
from flashhead_dist.bench.timer import record_step, replay_step
from flashhead_dist.errors import UserError
from flashhead_dist.evaluate.workload import Workload
from flashhead_dist.heads.registry import build_head
from flashhead_dist.models import open_model
from flashhead_dist.parallel import split_tensor_parallel
from flashhead_topology.machine import Machine

TWO_CORES = Machine("An EPYC", 2, 8_000_000_000, "Linux 6.1")
HEADS = ("dense_gather", "dense_local_max", "flashhead_replicated", "flashhead_global", "flashhead")
Run = Callable[..., list[Any]]


class _Silent:
    def __init__(self) -> None:
        self.stages: list[str] = []

    def stage(self, text: str) -> None:
        self.stages.append(text)


def _sweep(
    rank: int, world_size: int, folder: str, model_dir: str, index_dir: str, **changes: Any
) -> tuple[Sweep, _Silent]:
    model = open_model(model_dir)
    setup = decide_setup(
        TWO_CORES, local_rank=rank, local_world_size=world_size, threads_per_rank=1, heads=HEADS
    )
    states = torch.randn(40, 64, generator=torch.Generator().manual_seed(5)).to(torch.bfloat16)
    dense_ids = (states.float() @ model.read_rows(0, 1013).float().T).argmax(1)
    plan = Plan(
        heads=changes.get("heads", HEADS),
        tp_sizes=changes.get("tp_sizes", (1, 2, 3)),
        batch_sizes=(1, 4),
        dtype=torch.bfloat16,
        effort=Effort(iterations=4, warmup=1, cell_seconds=1.0),
        num_cores=2,
        fit=setup.fit,
    )
    progress = _Silent()
    provenance = make_provenance(
        {"versions": {}, "commit": "abc"},
        setup,
        model,
        index_hash="ff",
        num_probes=None,
        alpha=None,
        seed=0,
        world_size=world_size,
    )
    sweep = Sweep(
        plan=plan,
        model=model,
        workload=Workload(
            index_hash=None,
            origin="states of a test",
            index_dir=Path(index_dir),
            states=states,
            source_ids=torch.arange(40) % 2,
            sources=("even", "odd"),
            dense_ids=dense_ids,
        ),
        control=Control(FileStore(folder, world_size), rank, range(world_size)),
        host="here",
        provenance=provenance,
        write=lambda record: None,
        progress=progress,
    )
    return sweep, progress


def _rank_sweep(
    rank: int, world_size: int, folder: str, model_dir: str, index_dir: str
) -> dict[str, Any]:
    sweep, progress = _sweep(rank, world_size, folder, model_dir, index_dir)
    records = sweep.run(split_tensor_parallel((1, 2, 3)))
    return {
        "records": [asdict(record) for record in records],
        "num_stages": (len(progress.stages), sweep.plan.num_stages),
        "costs": len(sweep.costs),
    }


@pytest.fixture(scope="module")
def swept(
    run_ranks: Run, tied_model: Path, tied_index: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    store = tmp_path_factory.mktemp("store") / "store"
    return run_ranks(_rank_sweep, 3, str(store), str(tied_model), str(tied_index))


@pytest.fixture(scope="module")
def records(swept: list[dict[str, Any]]) -> dict[tuple[str, int, int], Record]:
    found = [Record(**record) for record in swept[0]["records"]]
    return {(record.head, record.tp_size, record.batch_size): record for record in found}


def test_every_cell_gives_a_record_on_the_first_rank_alone(
    swept: list[dict[str, Any]], records: dict[tuple[str, int, int], Record]
) -> None:
    assert set(records) == {
        (head, tp, batch) for head in HEADS for tp in (1, 2, 3) for batch in (1, 4)
    }
    assert len(swept[0]["records"]) == len(records)
    assert swept[1]["records"] == swept[2]["records"] == []


def test_progress_announces_as_many_stages_as_there_are(swept: list[dict[str, Any]]) -> None:
    assert swept[0]["num_stages"][0] == swept[0]["num_stages"][1]


def test_three_ranks_on_two_cores_are_projected_and_fewer_measured(
    records: dict[tuple[str, int, int], Record],
) -> None:
    for (_, tp_size, _), record in records.items():
        assert record.measured == (tp_size < 3)
        assert record.oversubscribed == (tp_size == 3)
        assert (record.p10_us is None) == (tp_size == 3)
        assert len(record.compute_us_by_rank) == tp_size


def test_a_projection_is_compute_alone_plus_modelled_communication(
    swept: list[dict[str, Any]], records: dict[tuple[str, int, int], Record]
) -> None:
    assert [rank["costs"] for rank in swept] == [3, 3, 3]
    for (head, tp_size, _), record in records.items():
        if tp_size < 3:
            continue
        assert record.communication_us is not None
        assert record.median_us == pytest.approx(record.compute_us + record.communication_us)
        assert (record.communication_us > 0) == (head != "flashhead_replicated")


def test_payloads_are_what_the_design_says(
    records: dict[tuple[str, int, int], Record],
) -> None:
    assert records["flashhead", 2, 1].payload_bytes_per_row == 8
    assert records["flashhead", 3, 4].payload_bytes_per_row == 8
    assert records["dense_gather", 2, 1].payload_bytes_per_row == pytest.approx(1013 * 2, rel=0.01)
    assert records["flashhead", 2, 1].num_collectives == 1
    assert records["flashhead_replicated", 3, 1].num_collectives == 0
    assert records["flashhead", 1, 1].payload_bytes_per_row == 0


def test_counted_bytes_are_there_or_say_why_not(
    records: dict[tuple[str, int, int], Record],
) -> None:
    """How many they are is tested where nothing else uses the interface; see test_measure_wire."""
    for (_, tp_size, _), record in records.items():
        assert (record.counted_bytes_per_row is None) == (record.counted_reason is not None)
        if tp_size == 1:
            assert record.counted_bytes_per_row is None


def test_agreement_is_the_same_at_every_size(
    records: dict[tuple[str, int, int], Record],
) -> None:
    for head in HEADS:
        assert len({records[head, tp, 1].top1_agreement for tp in (1, 2, 3)}) == 1
    assert records["dense_local_max", 2, 1].top1_agreement == 1.0
    assert records["flashhead", 2, 1].num_agreement_states == 40
    assert records["flashhead", 2, 1].worst_source in ("even", "odd")


def test_derived_figures_follow_from_the_medians(
    records: dict[tuple[str, int, int], Record],
) -> None:
    for (head, tp_size, batch_size), record in records.items():
        assert record.median_us is not None
        baseline = records["dense_local_max", tp_size, batch_size].median_us
        alone = records[head, 1, batch_size].median_us
        assert baseline is not None
        assert alone is not None
        assert record.speedup_over_dense_local_max == pytest.approx(baseline / record.median_us)
        assert record.scaling_efficiency == pytest.approx(alone / (tp_size * record.median_us))


def test_weights_are_shares(records: dict[tuple[str, int, int], Record]) -> None:
    whole = records["dense_local_max", 1, 1].weight_bytes_per_rank
    assert whole == 1013 * 64 * 2
    assert records["dense_local_max", 2, 1].weight_bytes_per_rank == 507 * 64 * 2
    assert records["dense_local_max", 2, 1].total_weight_bytes == whole
    replica = records["flashhead_replicated", 3, 1]
    assert replica.total_weight_bytes == 3 * replica.weight_bytes_per_rank


def _rank_replay(
    rank: int, world_size: int, model_dir: str, index_dir: str
) -> tuple[list[str], float, float]:
    """Record on all ranks, then replay on rank 0 while the others have left for good."""
    place = split_tensor_parallel((world_size,))[world_size]
    assert place is not None
    hidden = torch.randn(2, 64, generator=torch.Generator().manual_seed(5)).to(torch.bfloat16)
    heads = [
        build_head(name, tp=place, model=open_model(model_dir), index_dir=Path(index_dir))
        for name in HEADS
    ]
    recordings = [record_step(head, hidden) for head in heads]
    dist.barrier()
    before = place.num_collectives
    start_s = time.perf_counter()
    if rank == 0:
        for head, recording in zip(heads, recordings, strict=True):
            replay_step(head, hidden, recording)
        with pytest.raises(RuntimeError, match="exchange"):
            replay_step(heads[0], hidden, recordings[-1])
        with pytest.raises(RuntimeError, match="fewer exchanges"):
            replay_step(heads[2], hidden, recordings[-1])
    kinds = [str([str(operation) for operation, _ in r.exchanges]) for r in recordings]
    return kinds, time.perf_counter() - start_s, place.num_collectives - before


def test_replay_needs_no_other_rank(run_ranks: Run, tied_model: Path, tied_index: Path) -> None:
    results = run_ranks(_rank_replay, 2, str(tied_model), str(tied_index))
    kinds, _, num_collectives = results[0]
    assert num_collectives == 0
    assert kinds[0] == "['all_gather']"
    assert kinds[2] == "[]"
    assert kinds[4] == "['all_reduce_max']"


def _rank_broken_shard(
    rank: int, world_size: int, folder: str, model_dir: str, index_dir: str
) -> str:
    """Only the last rank of the group gets an index that is not there."""
    given = index_dir if rank != 1 else index_dir + "-missing"
    sweep, _ = _sweep(
        rank, world_size, folder, model_dir, given, heads=("flashhead",), tp_sizes=(2,)
    )
    try:
        sweep.run(split_tensor_parallel((2,)))
    except UserError as error:
        return str(error)
    return "no error"


def test_an_error_on_one_rank_stops_every_rank(
    run_ranks: Run, tied_model: Path, tied_index: Path, tmp_path: Path
) -> None:
    results = run_ranks(
        _rank_broken_shard, 3, str(tmp_path / "store"), str(tied_model), str(tied_index)
    )
    assert len(set(results)) == 1
    assert "-missing" in results[0]


def test_batches_differ_and_start_over_where_states_are_few() -> None:
    states = torch.arange(20.0).unsqueeze(1)
    batches = batches_of(states, 4)
    assert [len(batch) for batch in batches] == [4] * 5
    assert sorted(torch.cat(batches).flatten().tolist()) == states.flatten().tolist()
    assert [len(batch) for batch in batches_of(states, 32)] == [32]
    assert len(batches_of(states, 1)) == 16
