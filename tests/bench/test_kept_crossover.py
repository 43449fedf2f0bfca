"""A crossover outlives the run that measured it, and only where nothing that it is of changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flashhead_dist.bench import kept_crossover
from flashhead_dist.bench.control import Control
from flashhead_dist.bench.crossover import MEASURED_NOW, Crossover
from flashhead_dist.bench.kept_crossover import find_crossover_of, settle_crossover
from flashhead_dist.errors import UserError
from flashhead_dist.heads.flashhead_auto import FlashHeadAuto
from flashhead_dist.heads.registry import build_head
from flashhead_dist.models import open_model
from flashhead_dist.parallel import TensorParallel


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

    monkeypatch.setattr(kept_crossover, "measure_crossover", play)
    return asked


def _head(model: Path, index: Path, num_probes: int | None = None) -> FlashHeadAuto:
    head = build_head(
        "flashhead_auto",
        tp=TensorParallel.single(),
        model=open_model(str(model)),
        index_dir=index,
        num_probes=num_probes,
    )
    assert isinstance(head, FlashHeadAuto)
    return head


def _alone() -> Control:
    return Control(torch.distributed.HashStore(), 0, [0])


def _settle(head: FlashHeadAuto, largest: int, **options: Any) -> Crossover:
    return settle_crossover(
        head, lambda size: [], _alone(), largest=largest, in_turn=False, **options
    )


def test_it_is_measured_once_and_found_again(
    tied_model: Path, tied_index: Path, cache: Path, measured: list[int]
) -> None:
    head, again = _head(tied_model, tied_index), _head(tied_model, tied_index)
    assert find_crossover_of(head, _alone(), largest=1) is None
    first = _settle(head, 16)
    assert (first.origin, first.not_kept, head.changes_at) == (MEASURED_NOW, None, (12,))
    second = _settle(again, 15)
    assert measured == [16]
    assert second.origin.startswith("kept from 20")
    assert (second.changes_at, second.times_us) == ((12,), {16: (2.0, 1.0)})
    assert again.changes_at == (12,)
    assert find_crossover_of(head, _alone(), largest=1) == second
    assert _settle(again, 8, remeasure=True).changes_at == ()
    assert measured == [16, 8]


def test_one_that_was_not_reached_is_sought_further(
    tied_model: Path, tied_index: Path, cache: Path, measured: list[int]
) -> None:
    """Kept as if it held everywhere, "none up to 8" would leave a batch of 64 to retrieval."""
    head = _head(tied_model, tied_index)
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
    _settle(_head(tied_model, tied_index), 16)
    _settle(_head(tied_model, tied_index, num_probes=24), 16)
    other_threads = torch.get_num_threads() + 1
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: other_threads)
        _settle(_head(tied_model, tied_index), 16)
    with monkeypatch.context() as patch:
        patch.setattr(kept_crossover, "kernels_hash", lambda: "others")
        _settle(_head(tied_model, tied_index), 16)
    assert measured == [16] * 4
    _settle(_head(tied_model, tied_index), 16)
    assert measured == [16] * 4


def test_a_cache_that_cannot_be_written_is_said(
    tied_model: Path, tied_index: Path, cache: Path, measured: list[int]
) -> None:
    (cache / "measurements").write_text("in the way")
    head = _head(tied_model, tied_index)
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
    head = _head(tied_model, tied_index)
    assert _settle(head, 16).changes_at == (12,)
    assert find_crossover_of(head, _SecondRank(), largest=16) is None
    settle_crossover(head, lambda size: [], _SecondRank(), largest=8, in_turn=False)
    assert measured == [16, 8]
    assert find_crossover_of(head, _alone(), largest=16) is not None, "it writes nothing either"
