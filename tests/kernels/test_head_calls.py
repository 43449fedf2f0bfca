"""kernels/head_calls.py and check_stages.py: what `check_gpu.py` would find wrong with a kernel."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import check_stages
from bench_shapes import Shape, Shard, make_shard
from bench_ways import Checked, WrongResultError
from flashhead_kernels import reference
from flashhead_kernels.keys import pack_keys
from flashhead_kernels.shard import Candidates
from head_calls import Call, checked_calls

SHAPE = Shape("small", 4096, 64)
Change = Callable[[Candidates], Candidates]


@pytest.fixture(scope="module")
def shard() -> Shard:
    return make_shard(SHAPE, 64, torch.device("cpu"), seed=0)


def ops(change: Change = lambda found: found) -> Any:
    """The reference as a device's operations, its answers changed."""

    def flashhead(*given: Any, launches: int | None, **options: Any) -> Candidates:
        return change(reference.candidates(*given, **options))

    def dense(*given: Any, **options: Any) -> Candidates:
        return change(reference.dense_candidates(*given, **options))

    return SimpleNamespace(candidates=flashhead, dense_candidates=dense)


def keys(edit: Callable[[Tensor, Tensor], None]) -> Change:
    """A change of logits `[B, k]` and ids `[B, k]`, in place."""

    def change(found: Candidates) -> Candidates:
        logits, ids = reference.unpack_keys(found.keys)
        edit(logits, ids)
        return replace(found, keys=pack_keys(logits, ids))

    return change


def test_every_call_of_the_reference_is_right(shard: Shard) -> None:
    calls = checked_calls((1, 3))
    assert {(c.dense, c.launches) for c in calls} == {(False, 1), (False, 2), (True, None)}
    assert any(c.sampled for c in calls)
    for call in calls:
        states = call.states(shard, seed=1)
        found = call.check(shard, states, call.run(ops(), shard, states))
        assert found == Checked(call.batch * call.k, 0), call.name


@pytest.mark.parametrize(
    ("call", "change", "said"),
    [
        (Call(2, k=4), keys(lambda logits, ids: ids[1, 2:].copy_(ids[1, 2:].flip(0))), "logit"),
        (Call(2, k=4), keys(lambda logits, ids: logits[0, 3:].add_(1e-3)), "gave logit"),
        (Call(2, k=4, launches=2),
         keys(lambda logits, ids: (ids[0, 1:2].copy_(ids[0, :1]),
                                   logits[0, 1:2].copy_(logits[0, :1]))), "no tie"),
        (Call(2, dense=True, sampled=True), keys(lambda logits, ids: ids.add_(1)), "gave logit"),
        (Call(1, logsumexp=True), lambda f: replace(f, logsumexp=f.logsumexp + 0.01), "sum-exp"),
        (Call(1, unprobed=True), lambda f: replace(f, unprobed=f.unprobed + (1 << 52)), "unprobed"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused(shard: Shard, call: Call, change: Change, said: str) -> None:
    states = call.states(shard, seed=1)
    with pytest.raises(WrongResultError, match=said):
        call.check(shard, states, call.run(ops(change), shard, states))


def a_context(tmp_path: Path, limit_s: float = 60.0) -> check_stages.Context:
    return check_stages.Context(True, tmp_path, "correct", time.monotonic() + limit_s)


def test_a_step_whose_bits_change_is_caught(
    tmp_path: Path, shard: Shard, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[int] = []

    def now_and_then(found: Candidates) -> Candidates:
        runs.append(1)
        return replace(found, keys=found.keys + (len(runs) == 2))

    monkeypatch.setattr(check_stages, "ops_for", lambda device: ops(now_and_then))
    with pytest.raises(ValueError, match="2 keys of 2 runs"):
        check_stages._repeat(a_context(tmp_path), Call(2), shard)
    check_stages._repeat(a_context(tmp_path), Call(2), shard)


def test_cases_that_no_time_is_left_for_are_named(tmp_path: Path) -> None:
    left_out: list[str] = []
    assert list(a_context(tmp_path).within(["a", "b"], left_out)) == ["a", "b"]
    assert list(a_context(tmp_path, -1).within(["a", "b"], left_out)) == []
    assert left_out == ["a", "b"]
