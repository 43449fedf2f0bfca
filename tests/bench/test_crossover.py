"""Where a scan of the shard takes over from retrieval: the search, the head, the words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flashhead_dist.bench import crossover as crossover_module
from flashhead_dist.bench import timer
from flashhead_dist.bench.control import Control
from flashhead_dist.bench.crossover import (
    MEASURED_NOW,
    Crossover,
    crossover_notes,
    find_changes,
    find_crossover_of,
    measure_crossover,
    settle_crossover,
)
from flashhead_dist.errors import UserError
from flashhead_dist.heads.base import Want
from flashhead_dist.heads.flashhead import FlashHeadAuto, scans_at
from flashhead_dist.heads.registry import build_head
from flashhead_dist.models import ModelSource, open_model
from flashhead_dist.parallel import TensorParallel, split_tensor_parallel
from flashhead_kernels.dispatch import ops_for


@pytest.mark.parametrize("largest", [1, 16, 100, 1000])
@pytest.mark.parametrize("true_from", [1, 2, 3, 7, 16, 23, 97, 640, 5000])
def test_the_search_finds_the_size_to_one_part_in_32(largest: int, true_from: int) -> None:
    """To one in eight, retrieval could take 12 % longer than a scan just below."""
    asked: list[int] = []

    def faster(size: int) -> bool:
        asked.append(size)
        return size >= true_from

    found = find_changes(faster, largest)
    assert len(asked) == len(set(asked)) <= 20
    assert max(asked) <= largest
    if true_from > largest:
        assert found == ()
    else:
        assert true_from <= found[0] <= true_from * 32 / 31 + 1
        assert len(found) == 1


@pytest.mark.parametrize("changes", [(3, 8), (1, 2, 30), (5, 9, 40), (1, 32)])
def test_the_search_finds_where_retrieval_wins_again(changes: tuple[int, ...]) -> None:
    """Another kernel from some batch size on: a search that takes one turn would scan 8 rows."""
    found = find_changes(lambda size: scans_at(changes, size), 64)
    assert len(found) == len(changes)
    for one, true in zip(found, changes, strict=True):
        assert true <= one <= true * 32 / 31 + 1


def test_changes_alternate() -> None:
    scanned = [size for size in range(12) if scans_at((3, 6, 10), size)]
    assert scanned == [3, 4, 5, 10, 11]
    assert not any(scans_at((), size) for size in range(5))


def _auto(
    model: ModelSource, index: Path, tp: TensorParallel, num_probes: int | None = None
) -> FlashHeadAuto:
    head = build_head("flashhead_auto", tp=tp, model=model, index_dir=index, num_probes=num_probes)
    assert isinstance(head, FlashHeadAuto)
    return head


@pytest.fixture
def model(tied_model: Path) -> ModelSource:
    return open_model(str(tied_model))


@pytest.fixture
def states() -> torch.Tensor:
    return torch.randn(20, 64, generator=torch.Generator().manual_seed(8)).to(torch.bfloat16)


@pytest.fixture
def auto(model: ModelSource, tied_index: Path) -> FlashHeadAuto:
    return _auto(model, tied_index, TensorParallel.single())


@pytest.mark.parametrize("batch", [1, 3, 20])
def test_a_scan_is_the_dense_head(
    auto: FlashHeadAuto, model: ModelSource, states: torch.Tensor, batch: int
) -> None:
    dense = build_head("dense_local_max", tp=TensorParallel.single(), model=model)
    auto.changes_at = (1,)
    want = Want(k=3, logsumexp=True)
    found, truth = auto.serve(states[:batch], want), dense.serve(states[:batch], want)
    assert torch.equal(found.token_ids, truth.token_ids)
    assert torch.equal(found.logits, truth.logits)
    assert torch.allclose(found.logsumexp, truth.logsumexp, rtol=1e-5)
    assert auto.serve(states[:batch], Want(candidate_mass=True)).logsumexp is None
    assert auto.read_bytes_per_step(1) >= dense.read_bytes_per_step(1)


def test_a_loaded_shard_is_scanned_in_one_piece(
    auto: FlashHeadAuto, states: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two scans and what merges them are half of a step where a rank's part is small."""
    scans: list[int] = []
    real = ops_for("cpu").dense_candidates

    def spy(hidden: torch.Tensor, rows: torch.Tensor, *given: Any, **options: Any) -> Any:
        scans.append(len(rows))
        return real(hidden, rows, *given, **options)

    monkeypatch.setattr(ops_for("cpu"), "dense_candidates", spy)
    assert auto.shard.pinned_token_ids.numel() == 8
    auto.scan(states, Want(k=3))
    assert scans == [8 * 32 * 4 + 8]


def test_below_the_crossover_it_is_flashhead(
    auto: FlashHeadAuto, model: ModelSource, tied_index: Path, states: torch.Tensor
) -> None:
    retrieval = build_head(
        "flashhead", tp=TensorParallel.single(), model=model, index_dir=tied_index
    )
    auto.changes_at = (4,)
    few, many = states[:3], states[:4]
    assert torch.equal(auto.forward(few, k=2).logits, retrieval.forward(few, k=2).logits)
    assert auto.read_bytes_per_step(3) == retrieval.read_bytes_per_step(3)
    dense = build_head("dense_local_max", tp=TensorParallel.single(), model=model)
    assert torch.equal(auto.forward(many).token_ids, dense.forward(many).token_ids)


def _rank_scan(rank: int, world_size: int, name: str, index: Path, states: torch.Tensor) -> Any:
    model = open_model(name)
    tp = split_tensor_parallel([world_size])[world_size]
    assert tp is not None
    head = _auto(model, index, tp)
    head.changes_at = (2,)
    return head.forward(states).token_ids, head.forward(states[:1]).token_ids


@pytest.mark.parametrize("world_size", [2, 3])
def test_real_ranks_scan_as_one(
    run_ranks: Callable[..., list[Any]],
    model: ModelSource,
    tied_model: Path,
    tied_index: Path,
    states: torch.Tensor,
    world_size: int,
) -> None:
    alone = build_head("dense_local_max", tp=TensorParallel.single(), model=model)
    retrieval = build_head(
        "flashhead", tp=TensorParallel.single(), model=model, index_dir=tied_index
    )
    expected = alone.forward(states).token_ids, retrieval.forward(states[:1]).token_ids
    for found in run_ranks(_rank_scan, world_size, str(tied_model), tied_index, states):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("in_turn", [False, True])
def test_the_slowest_rank_decides(
    auto: FlashHeadAuto, monkeypatch: pytest.MonkeyPatch, in_turn: bool
) -> None:
    """Retrieval of 10 us a row, scans of 45 us; the other rank's scan takes 65."""

    class TwoRanks(Control):
        def gather(self, value: Any) -> list[Any]:
            if value is None:
                return [None]
            retrieval_us, scan_us = value
            return [value, (retrieval_us - 1, scan_us + 20)]

        def barrier(self) -> None:
            pass

    monkeypatch.setattr(
        crossover_module, "_medians_us", lambda head, batches: (10.0 * len(batches[0]), 45.0)
    )
    found = measure_crossover(
        auto,
        lambda size: [torch.zeros(size, 4)],
        TwoRanks(SimpleNamespace(), 0, [0]),  # type: ignore[arg-type]
        largest=64,
        in_turn=in_turn,
    )
    assert found.changes_at == (7,)
    assert found.largest == 64
    assert found.times_us[8] == (80.0, 65.0)


def test_it_is_measured_for_real(auto: FlashHeadAuto, states: torch.Tensor) -> None:
    store = torch.distributed.HashStore()
    found = measure_crossover(
        auto, lambda size: [states[:size]], Control(store, 0, [0]), largest=4, in_turn=False
    )
    assert 1 in found.times_us
    assert all(us > 0 for both in found.times_us.values() for us in both)


def test_on_cuda_it_is_graphs_that_are_timed(
    auto: FlashHeadAuto, states: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Launched from Python, a step takes as long as its launches, of which a scan has more."""

    captured: list[Any] = []

    class Captured:
        def __init__(self, work: Any, batch: torch.Tensor) -> None:
            self.us = 5.0 if work.func == auto.retrieve else 7.0
            captured.append(work.func)

        def load(self, batch: torch.Tensor) -> None: ...
        def replay(self) -> float:
            return self.us

    clock = SimpleNamespace(time_us=lambda work: work())
    monkeypatch.setattr(timer, "CapturedWork", Captured)
    monkeypatch.setattr(crossover_module, "step_clock", lambda device: clock)
    auto.tp.device = torch.device("cuda")
    assert crossover_module._medians_us(auto, [states[:2]]) == (5.0, 7.0)
    assert captured == [auto.retrieve, auto.scan]


def test_notes_say_where_and_what_it_cost() -> None:
    def record(head: str, batch_size: int, compute_us: float) -> Any:
        return SimpleNamespace(head=head, tp_size=2, batch_size=batch_size, compute_us=compute_us)

    records = [
        record("flashhead", 1, 100.0), record("dense_local_max", 1, 900.0),
        record("flashhead_auto", 1, 118.0), record("flashhead", 32, 2000.0),
        record("dense_local_max", 32, 1000.0), record("flashhead_auto", 32, 1040.0),
    ]  # fmt: skip
    never = Crossover((), {16: (1.0, 2.0)})
    kept = Crossover((20,), {32: (2.0, 1.0)}, "kept from 2026-11-21", "the disk is full.")
    found = {1: never, 2: kept, 4: never, 8: Crossover((3, 8, 20), {32: (1.0, 1.0)})}
    notes = crossover_notes(found, records)
    assert "at no batch size up to 16 at tp 1, 4 (measured now)" in notes[0]
    assert "from batch 20 on (of 1 to 32) at tp 2 (kept from 2026-11-21)" in notes[1]
    assert "from batch 3 to 7 and from batch 20 on (of 1 to 32) at tp 8" in notes[2]
    assert notes[3].endswith("was not cached: the disk is full.")
    assert "at worst +4.0 % longer" in notes[4]
    assert "(tp 2, batch 32): within the 5 % that it may lose" in notes[4]
    assert "they differ by +18.0 to +18.0 % here" in notes[5], "the same work is no loss"
    records.append(record("flashhead_auto", 32, 1051.0))
    assert "BEYOND the 5 %" in crossover_notes(found, records)[4]
    scans_too_early = {2: Crossover((1,), {32: (2.0, 1.0)})}
    assert "+18.0 % longer" in crossover_notes(scans_too_early, records)[1]
    assert crossover_notes({}, records[:2]) == []


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> Path:
    """An empty cache folder; the model of the tests is in another."""
    assert own_cache != tmp_path
    monkeypatch.setenv("FLASHHEAD_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Largest batch size of each measurement; all find that a scan wins from 12 rows on."""
    asked: list[int] = []

    def play(head: Any, batches: Any, control: Any, *, largest: int, in_turn: bool) -> Crossover:
        asked.append(largest)
        return Crossover((12,) if largest >= 12 else (), {largest: (2.0, 1.0)})

    monkeypatch.setattr(crossover_module, "measure_crossover", play)
    return asked


def _cached(model: Path, index: Path, num_probes: int | None = None) -> FlashHeadAuto:
    return _auto(open_model(str(model)), index, TensorParallel.single(), num_probes)


def _alone() -> Control:
    return Control(torch.distributed.HashStore(), 0, [0])


def _settle(head: FlashHeadAuto, largest: int, **options: Any) -> Crossover:
    return settle_crossover(
        head, lambda size: [], _alone(), largest=largest, in_turn=False, **options
    )


def test_it_is_measured_once_and_found_again(
    tied_model: Path, tied_index: Path, cache: Path, measured: list[int]
) -> None:
    head, again = _cached(tied_model, tied_index), _cached(tied_model, tied_index)
    assert find_crossover_of(head, _alone(), largest=1) is None
    first = _settle(head, 16)
    assert (first.origin, first.not_kept, head.changes_at) == (MEASURED_NOW, None, (12,))
    second = _settle(again, 15)
    assert measured == [16]
    assert second.origin.startswith("cached 20")
    assert (second.changes_at, second.times_us) == ((12,), {16: (2.0, 1.0)})
    assert again.changes_at == (12,)
    assert find_crossover_of(head, _alone(), largest=1) == second
    assert _settle(again, 8, remeasure=True).changes_at == ()
    assert measured == [16, 8]


def test_one_that_was_not_reached_is_sought_further(
    tied_model: Path, tied_index: Path, cache: Path, measured: list[int]
) -> None:
    """Kept as if it held everywhere, "none up to 8" would leave a batch of 64 to retrieval."""
    head = _cached(tied_model, tied_index)
    assert _settle(head, 8).changes_at == ()
    assert _settle(head, 4).changes_at == ()
    assert measured == [8]
    assert _settle(head, 64).changes_at == (12,)
    assert _settle(head, 8).changes_at == (12,)
    assert measured == [8, 64]


def test_what_it_is_of_decides(
    tied_model: Path,
    tied_index: Path,
    cache: Path,
    measured: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _settle(_cached(tied_model, tied_index), 16)
    _settle(_cached(tied_model, tied_index, num_probes=24), 16)
    other_threads = torch.get_num_threads() + 1
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: other_threads)
        _settle(_cached(tied_model, tied_index), 16)
    with monkeypatch.context() as patch:
        patch.setattr(crossover_module, "kernels_hash", lambda: "others")
        _settle(_cached(tied_model, tied_index), 16)
    assert measured == [16] * 4
    _settle(_cached(tied_model, tied_index), 16)
    assert measured == [16] * 4


def test_a_cache_that_cannot_be_written_is_said(
    tied_model: Path, tied_index: Path, cache: Path, measured: list[int]
) -> None:
    (cache / "measurements").write_text("in the way")
    head = _cached(tied_model, tied_index)
    with pytest.raises(UserError, match="cannot be read"):
        find_crossover_of(head, _alone(), largest=1)
    found = _settle(head, 16, remeasure=True)
    assert found.not_kept is not None
    assert "cannot be written" in found.not_kept
    assert head.changes_at == (12,)


class _SecondRank(Control):
    """The second of two ranks; the first has found nothing in its own cache."""

    def __init__(self) -> None:
        super().__init__(torch.distributed.HashStore(), 1, [0, 1])

    def gather(self, value: Any) -> list[Any]:
        return [None, value]

    def broadcast(self, value: Any) -> Any:
        return None


def test_ranks_with_other_caches_change_over_with_the_first(
    tied_model: Path, tied_index: Path, cache: Path, measured: list[int]
) -> None:
    """Were each rank to read its own cache, this one alone would find 12 and not measure."""
    head = _cached(tied_model, tied_index)
    assert _settle(head, 16).changes_at == (12,)
    assert find_crossover_of(head, _SecondRank(), largest=16) is None
    settle_crossover(head, lambda size: [], _SecondRank(), largest=8, in_turn=False)
    assert measured == [16, 8]
    assert find_crossover_of(head, _alone(), largest=16) is not None, "it writes nothing either"
