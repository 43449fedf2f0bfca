"""One launch or two by a table of what was measured; without a GPU, by a clock that is played."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from flashhead_kernels import launch_choice, triton_launch
from flashhead_kernels.dispatch import ops_for
from flashhead_kernels.launch_choice import CAPTURED, MEASURED_NOW, NO_GPU, LaunchTable
from flashhead_kernels.shard import IndexShard
from tests.kernels.shards import candidates, make_shard, random_states

SHAPE = (2, 2, 1, 64, 4, 64, 0, torch.bfloat16)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Clock:
    """Stands for events: one launch takes `one_us`, two take `two_us`; knows them by their name."""

    def __init__(self, one_us: float, two_us: float) -> None:
        self.us = {"one": one_us, "two": two_us}
        self.runs: list[str] = []

    def time_us(self, run: Any) -> float:
        run()
        self.runs.append(run.func.__name__)
        return self.us[run.func.__name__]


class Store:
    """A LaunchStore in memory."""

    def __init__(self) -> None:
        self.kept: list[tuple[dict[str, Any], dict[str, Any]]] = []

    def find(self, case: Mapping[str, Any]) -> Mapping[str, Any] | None:
        return next((found for of, found in self.kept if of == case), None)

    def keep(self, case: Mapping[str, Any], found: Mapping[str, Any]) -> None:
        self.kept.append((dict(case), dict(found)))


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> LaunchTable:
    fresh = LaunchTable()
    monkeypatch.setattr(launch_choice, "table", fresh)
    monkeypatch.setattr(launch_choice, "_WARM_UPS", 1)
    monkeypatch.setattr(launch_choice, "_ROUNDS", 2)
    return fresh


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels' ways that ran, in order."""
    ways: list[str] = []
    for name, function in (("one", "_one_launch"), ("two", "_two_launches")):
        real = getattr(triton_launch, function)

        def spy(*given: Any, name: str = name, real: Any = real) -> Any:
            ways.append(name)
            return real(*given)

        spy.__name__ = name
        monkeypatch.setattr(triton_launch, function, spy)
    return ways


@pytest.fixture(scope="module")
def shard() -> IndexShard:
    shard = make_shard(*SHAPE)
    return shard.to(DEVICE)


def run(shard: IndexShard, batch: int = 2, **options: Any) -> Any:
    return candidates(ops_for("cuda"), shard, random_states(batch, 64).to(DEVICE), 1, **options)


def play(monkeypatch: pytest.MonkeyPatch, clock: Clock | None) -> None:
    monkeypatch.setattr(launch_choice, "launch_clock", lambda device: clock)


@pytest.mark.parametrize(("one_us", "two_us", "chosen"), [(9.0, 7.5, "two"), (7.5, 7.5, "one")])
def test_the_faster_way_serves_and_is_measured_once(
    table: LaunchTable,
    launched: list[str],
    shard: IndexShard,
    monkeypatch: pytest.MonkeyPatch,
    one_us: float,
    two_us: float,
    chosen: str,
) -> None:
    """A choice that is made but not used, or timed the wrong way round, fails here."""
    clock = Clock(one_us, two_us)
    play(monkeypatch, clock)
    first = run(shard)
    assert launched[-1] == chosen
    timed = len(clock.runs)
    assert clock.runs.count("one") == clock.runs.count("two") == timed // 2 == 3
    again = run(shard)
    assert launched[-1] == chosen
    assert len(clock.runs) == timed
    assert torch.equal(first.keys, again.keys)
    (choice,) = table.choices()
    assert (choice["one_us"], choice["two_us"], choice["origin"]) == (one_us, two_us, MEASURED_NOW)


def test_every_case_is_a_choice_of_its_own(
    table: LaunchTable, launched: list[str], shard: IndexShard, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(monkeypatch, Clock(9.0, 7.5))
    for options in ({}, {"batch": 3}, {"k": 2}, {"need_logsumexp": True}):
        run(shard, **options)
    assert len(table.choices()) == 4
    assert {choice["batch"] for choice in table.choices()} == {2, 4}
    run(shard, batch=9)
    run(shard, launches=2)
    assert launched[-2:] == ["one", "two"]
    assert len(table.choices()) == 4, "nothing to choose for 9 rows, nor where the caller has"


def test_a_store_saves_the_next_process_the_measuring(
    table: LaunchTable, launched: list[str], shard: IndexShard, monkeypatch: pytest.MonkeyPatch
) -> None:
    table.store = Store()
    play(monkeypatch, Clock(9.0, 7.5))
    run(shard)
    next_process = LaunchTable()
    next_process.store = table.store
    monkeypatch.setattr(launch_choice, "table", next_process)
    clock = Clock(1.0, 2.0)
    play(monkeypatch, clock)
    run(shard)
    assert launched[-1] == "two"
    assert not clock.runs
    (choice,) = next_process.choices()
    assert choice["origin"].startswith("cached 20")
    assert (choice["one_us"], choice["two_us"]) == (9.0, 7.5)
    monkeypatch.setattr(launch_choice, "_software", lambda: {"kernels": "others"})
    run(shard, batch=3)
    assert clock.runs, "what other kernels took is no measurement of these"


def test_nothing_is_timed_while_a_graph_is_captured(
    table: LaunchTable, launched: list[str], shard: IndexShard, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(9.0, 7.5)
    play(monkeypatch, clock)
    monkeypatch.setattr(launch_choice, "_capturing", lambda device: True)
    run(shard)
    assert launched == ["one"]
    assert not clock.runs
    assert table.choices()[0]["origin"] == CAPTURED
    monkeypatch.setattr(launch_choice, "_capturing", lambda device: False)
    run(shard)
    assert launched[-1] == "two", "it is measured when it is met again"
    assert table.choices()[0]["origin"] == MEASURED_NOW


@pytest.mark.skipif(DEVICE == "cuda", reason="of the interpreter")
def test_without_a_gpu_the_rule_is_named(
    table: LaunchTable, launched: list[str], shard: IndexShard
) -> None:
    run(shard)
    assert launched == ["one"]
    assert table.choices()[0]["origin"] == NO_GPU


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device to time and to capture")
def test_a_gpu_is_timed_in_the_warm_up_of_a_graph(table: LaunchTable, shard: IndexShard) -> None:
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected = run(shard).keys.clone()
    stream.synchronize()
    (choice,) = table.choices()
    assert choice["origin"] == MEASURED_NOW
    assert min(choice["one_us"], choice["two_us"]) > 0
    states = random_states(2, 64).to(DEVICE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        found = candidates(ops_for("cuda"), shard, states, 1).keys
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(found, expected)
    assert table.choices() == [choice], "nothing is timed or chosen anew while it is captured"
