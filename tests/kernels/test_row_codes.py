"""int8 candidate rows: the kernel against its definition, and the definition against its claim.

Mutated to see each fail: scales read without the rows before them, an offset of 8 for 128 in the
states' sums, logits left as the codes give them, pads kept, one row kept for two.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flashhead_kernels import cpu, cpu_row_codes, row_codes
from flashhead_kernels.candidates import quantize_hidden_states
from flashhead_kernels.keys import unpack_keys
from flashhead_kernels.row_codes import KEPT, RowCodes, code_rows
from tests.kernels.shards import ALPHA, Shard, make_shard, random_states

BOTH = pytest.mark.parametrize("ops", [cpu_row_codes, row_codes], ids=["cpu", "reference"])
# (groups, clusters, tokens, hidden size, bits, scale group, pinned, rows' dtype)
SHAPES = [
    (3, 7, 4, 64, 4, 64, 0, torch.bfloat16),
    (4, 9, 2, 96, 4, 32, 3, torch.float32),
    (2, 32, 4, 640, 4, 64, 1, torch.bfloat16),
    (2, 9, 8, 256, 16, 256, 0, torch.bfloat16),
    (2, 16, 3, 128, 8, 64, 1, torch.float16),
    (3, 16, 1, 64, 4, 64, 2, torch.bfloat16),
    (1, 1, 1, 64, 4, 64, 0, torch.bfloat16),
]


def find(
    ops: Any, shard: Shard, codes: RowCodes, states: Tensor, probes: int, k: int
) -> tuple[Tensor, Tensor]:
    """Logits and ids `[B, k]`."""
    found = ops.coded_candidates(
        states, codes, shard.rows, shard.token_ids, shard.centroids, shard.spread, ALPHA, probes,
        shard.pinned_rows, shard.pinned_ids, k=k,
    )  # fmt: skip
    return unpack_keys(found)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_the_kernel_is_its_definition(shape: Any, batch: int) -> None:
    shard = make_shard(*shape)
    codes, states = code_rows(shard.rows), random_states(batch, shape[3])
    for k in (1, 4):
        for probes in {1, (shape[1] + 1) // 2, shape[1]}:
            logits, ids = find(cpu_row_codes, shard, codes, states, probes, k)
            expected, expected_ids = find(row_codes, shard, codes, states, probes, k)
            assert torch.equal(ids, expected_ids)
            torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-4)


@BOTH
def test_codes_choose_and_rows_score(ops: Any) -> None:
    """Codes of the negated rows keep each group's least rows, whose own logits are given."""
    shard = make_shard(2, 9, 4, 64, 4, 64, 0, torch.bfloat16)
    states = random_states(3, 64)
    wrong = code_rows(-shard.rows)
    logits, ids = find(ops, shard, wrong, states, 9, KEPT)
    real = shard.token_ids.flatten(1) >= 0
    rounded = wrong.dequantize(torch.arange(18).view(2, 9)).flatten(1, 2)
    integers, scale = quantize_hidden_states(states, 64)
    for b in range(3):
        by_codes = (rounded @ (integers[b] * scale[b])).masked_fill(~real, -torch.inf)
        kept = by_codes.topk(KEPT).indices
        own = shard.rows.flatten(1, 2).double() @ states[b].double()
        values = own.gather(1, kept).flatten().topk(KEPT).values
        assert values[0] < own[real].median(), "the rows that the codes call best are not"
        torch.testing.assert_close(logits[b].double(), values, rtol=1e-5, atol=1e-4)
    exact = cpu.flashhead_candidates(
        states, shard.rows, shard.token_ids, shard.centroids, shard.spread, ALPHA, 9,
        shard.pinned_rows, shard.pinned_ids, k=72,
    ).keys  # fmt: skip
    by_id = dict(zip(*(part[0].tolist() for part in reversed(unpack_keys(exact))), strict=True))
    torch.testing.assert_close(logits[0], torch.tensor([by_id[i] for i in ids[0].tolist()]))


@BOTH
def test_rounding_may_exchange_the_two_best_of_a_group(ops: Any) -> None:
    shard = make_shard(1, 8, 4, 64, 4, 64, 0, torch.bfloat16)
    state = random_states(1, 64)
    flat_rows = shard.rows.view(-1, 64)
    own = flat_rows.double() @ state[0].double()
    first, second = own.masked_fill(shard.token_ids.flatten() < 0, -torch.inf).topk(2).indices
    exchanged = flat_rows.clone()
    exchanged[first], exchanged[second] = flat_rows[second], flat_rows[first]
    _, ids = find(ops, shard, code_rows(exchanged.view_as(shard.rows)), state, 8, 1)
    assert ids.item() == shard.token_ids.flatten()[first].item()


@BOTH
def test_the_best_of_random_rows_survives_rounding(ops: Any) -> None:
    shard = make_shard(4, 32, 4, 640, 4, 64, 2, torch.bfloat16)
    states, codes = random_states(16, 640), code_rows(shard.rows)
    logits, ids = find(ops, shard, codes, states, 32, 1)
    every, tokens = shard.every_logit(states)
    best = every.max(1)
    assert torch.equal(ids[:, 0], tokens[best.indices].long())
    torch.testing.assert_close(logits[:, 0].double(), best.values, rtol=1e-5, atol=1e-4)


def test_codes_are_within_half_a_step_of_the_rows() -> None:
    rows = make_shard(3, 7, 4, 96, 4, 32, 0, torch.bfloat16).rows
    codes = code_rows(rows)
    assert codes.data.shape == (3, 7, 4 * (96 + 2 * 3))
    found = codes.dequantize(torch.arange(21).view(3, 7))
    largest = rows.float().unflatten(3, (3, 32)).abs().amax(-1, keepdim=True)
    error = (found - rows.float()).unflatten(3, (3, 32)).abs()
    # A bfloat16 scale is rounded up by at most 1/128.
    assert bool((error <= 1.01 * largest / 127 / 2 * (1 + 1 / 128)).all())


def test_a_hidden_size_without_codes_is_refused() -> None:
    with pytest.raises(ValueError, match="rows of 40 columns have no int8 codes"):
        code_rows(torch.zeros(1, 1, 1, 40))
