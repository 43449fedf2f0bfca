"""Ranks as threads over a real store: values arrive, and one rank's mistake stops them all."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from torch.distributed import HashStore  # type: ignore[attr-defined]

from flashhead_dist.bench.control import Control, PeerError
from flashhead_dist.errors import UserError


def on_ranks(number: int, work: Callable[[Control], Any]) -> list[Any]:
    """Run `work` on `number` ranks and return what each gave or raised."""
    store = HashStore()
    results: list[Any] = [None] * number

    def rank_main(rank: int) -> None:
        try:
            results[rank] = work(Control(store, rank, range(number)))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=rank_main, args=(r,), daemon=True) for r in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert not any(thread.is_alive() for thread in threads), "a rank hangs"
    return results


def test_gather_is_in_rank_order_everywhere() -> None:
    expected = [[0, "a"], [1, "a"], [2, "a"]]
    assert on_ranks(3, lambda control: control.gather([control.rank, "a"])) == [expected] * 3


def test_broadcast_is_the_first_ranks_value() -> None:
    assert on_ranks(3, lambda control: control.broadcast(control.rank + 10)) == [10] * 3


def test_calls_do_not_mix() -> None:
    def work(control: Control) -> Any:
        return [control.gather(control.rank * step) for step in range(20)]

    expected = [[0, step] for step in range(20)]
    assert on_ranks(2, work) == [expected] * 2


def test_a_group_leaves_the_others_alone() -> None:
    def work(control: Control) -> Any:
        if control.rank < 2:
            group = control.among(range(2), "pair")
            assert group.gather(control.rank) == [0, 1]
        return control.gather(control.rank)

    assert on_ranks(3, work) == [[0, 1, 2]] * 3


def test_a_mistake_on_one_rank_is_every_ranks_error() -> None:
    def work(control: Control) -> None:
        with control.phase():
            if control.rank == 1:
                raise UserError("shard 1 is damaged: rebuild it")

    errors = on_ranks(3, work)
    assert [str(error) for error in errors] == ["shard 1 is damaged: rebuild it"] * 3
    assert [error.first_rank for error in errors] == [1] * 3
    assert all(isinstance(error, PeerError) and error.exit_code == 2 for error in errors)


def test_of_several_mistakes_the_lowest_ranks_is_told() -> None:
    def work(control: Control) -> None:
        with control.phase():
            if control.rank:
                raise UserError(f"rank {control.rank} is wrong")

    assert {str(error) for error in on_ranks(3, work)} == {"rank 1 is wrong"}


def test_a_mistake_inside_a_group_reaches_ranks_outside_it() -> None:
    def work(control: Control) -> None:
        with control.phase():
            if control.rank < 2:
                group = control.among(range(2), "pair")
                with group.phase():
                    if control.rank == 1:
                        raise UserError("bad")
                pytest.fail("the phase let a mistake pass")

    errors = on_ranks(3, work)
    assert [str(error) for error in errors] == ["bad"] * 3


def test_a_phase_without_mistakes_passes() -> None:
    def work(control: Control) -> str:
        with control.phase():
            control.barrier()
        return "fine"

    assert on_ranks(2, work) == ["fine", "fine"]


def test_other_exceptions_are_not_shared() -> None:
    def work(control: Control) -> None:
        with control.phase():
            raise KeyError("a bug")

    assert all(isinstance(error, KeyError) for error in on_ranks(2, work))
