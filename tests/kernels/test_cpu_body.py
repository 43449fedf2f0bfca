"""A pool of threads: each piece of each product done once, whoever is awake."""

from __future__ import annotations

import gc
import threading

import pytest
import torch

from flashhead_kernels.cpu_body import _PARTS, MatVecPool

# One piece, several, a last piece that is short, rows longer than a piece, none.
SHAPES = [(1, 640), (257, 640), (1000, 640), (5, 70_001), (3, 7), (0, 64)]


def _product(weight: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    return (weight.double() @ state.double()).float()


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products(threads: int, dtype: torch.dtype) -> None:
    """More threads than cores, so that some are held up; a piece done by none or by two fails."""
    torch.manual_seed(0)
    pool = MatVecPool(threads)
    pool.wake()
    for rows, size in SHAPES:
        weight, state = torch.randn(rows, size).to(dtype), torch.randn(size)
        found = pool.multiply(weight, state, following=weight)
        scale = weight.double().norm(dim=1).float() * state.norm() * 2.0**-20
        assert bool(((found - _product(weight, state)).abs() <= scale).all()), (rows, size)
    pool.dismiss()


def test_a_row_has_the_same_bits_however_many_threads() -> None:
    torch.manual_seed(1)
    weight, state = torch.randn(999, 640), torch.randn(640)
    alone = MatVecPool(1).multiply(weight, state)
    pool = MatVecPool(4)
    pool.wake()
    for _ in range(20):
        assert torch.equal(pool.multiply(weight, state), alone)
    pool.dismiss()
    assert torch.equal(pool.multiply(weight[5:9], state), alone[5:9])


def test_woken_and_dismissed_at_any_time() -> None:
    """Wakings may come late. Signs alternate, so that what an earlier product left where the result
    lies is wrong: an asker that did not wait for the others' pieces fails."""
    torch.manual_seed(2)
    weights = [torch.randn(rows, 64) for rows in (1, 1100, 3000, 20_000)]
    states = [torch.randn(64)]
    states.append(-states[0])
    truths = [MatVecPool(1).multiply(weight, states[0]) for weight in weights]
    pool = MatVecPool(3)
    for turn in range(500):
        if turn % 3:
            pool.wake()
        for weight, truth in zip(weights, truths, strict=True):
            found = pool.multiply(weight, states[turn % 2])
            assert torch.equal(found if turn % 2 == 0 else -found, truth)
        if turn % 7:
            pool.dismiss()


def test_dismissed_twice_it_can_be_woken() -> None:
    """A word kept over a dismissal, of a pool that was dismissed already, would end all help."""
    pool = MatVecPool(2)
    pool.wake()
    pool.dismiss()
    pool.dismiss()
    pool.wake()
    assert pool._box[_PARTS] == 0
    pool.dismiss()


def test_infinity_and_nan_pass_through() -> None:
    weight, state = torch.ones(3, 64), torch.zeros(64)
    state[0], weight[1, 0], weight[2, 0] = float("inf"), 0.0, -1.0
    found = MatVecPool(1).multiply(weight, state)
    assert found[0] == float("inf")
    assert torch.isnan(found[1])
    assert found[2] == float("-inf")


def test_a_crew_that_nobody_holds_goes_home() -> None:
    before = set(threading.enumerate())
    pool = MatVecPool(3)
    pool.wake()
    members = [each for each in threading.enumerate() if each not in before]
    assert [each.name for each in members] == ["flashhead-matvec"] * 2
    del pool
    gc.collect()
    for member in members:
        member.join(timeout=10)
        assert not member.is_alive()
