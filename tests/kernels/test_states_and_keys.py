"""The CPU's checks of hidden states and its reading of keys, against their twins."""

from __future__ import annotations

import pytest
import torch

from flashhead_kernels import cpu, reference
from flashhead_kernels.cpu_threads import LARGE_PAGE_BYTES, empty_on_large_pages
from flashhead_kernels.keys import EMPTY_KEY, pack_keys

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BOTH = pytest.mark.parametrize("ops", [cpu, reference], ids=["cpu", "reference"])


@BOTH
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_greatest_and_smallest_floats_are_finite(ops, dtype: torch.dtype) -> None:  # type: ignore[no-untyped-def]
    limits = torch.finfo(dtype)
    states = torch.tensor([[limits.max, limits.min, limits.tiny, -0.0, 0.0, 1.0]], dtype=dtype)
    states = torch.cat([states, states * 0 + limits.smallest_normal / 4])
    assert ops.all_finite(states)
    assert ops.all_finite(states[:0])


@BOTH
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_one_bad_number_is_seen_wherever_it_is(ops, dtype: torch.dtype, bad: float) -> None:  # type: ignore[no-untyped-def]
    for place in (0, 7, 63, 127):
        states = torch.ones(2, 64, dtype=dtype)
        states.view(-1)[place] = bad
        assert not ops.all_finite(states)
        assert not ops.all_finite(states.T), "the memory's order must not matter"


@BOTH
@pytest.mark.parametrize("shape", [(0, 1), (1, 1), (3, 5)])
def test_keys_unpack_to_what_was_packed(ops, shape: tuple[int, int]) -> None:  # type: ignore[no-untyped-def]
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 1e3
    ids = torch.arange(logits.numel()).view(shape) * 1001
    keys = pack_keys(logits, ids)
    if keys.numel() > 1:
        keys[-1, -1], logits[-1, -1], ids[-1, -1] = EMPTY_KEY, float("-inf"), -1
    got, got_ids = ops.unpack_keys(keys)
    assert got.dtype == torch.float32
    assert got_ids.dtype == torch.int64
    assert torch.equal(got, logits)
    assert torch.equal(got_ids, ids)
    assert torch.equal(ops.unpack_keys(keys.T)[1], ids.T)


def test_large_and_small_tensors_are_ordinary_tensors() -> None:
    for count in (0, 5, 3 * LARGE_PAGE_BYTES):
        tensor = empty_on_large_pages((count, 2), torch.bfloat16)
        assert tensor.shape == (count, 2)
        assert tensor.is_contiguous()
        tensor.fill_(1.5)
        assert float(tensor.float().sum()) == 3.0 * count
