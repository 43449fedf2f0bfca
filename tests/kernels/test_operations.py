"""Each operation of `cpu` against its twin in `reference` and against a float64 truth."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from flashhead_kernels import cpu, reference
from flashhead_kernels.dispatch import ops_for
from flashhead_kernels.keys import EMPTY_KEY, pack_keys, unpack_keys
from tests.kernels.shards import agree, candidates, every_logit, make_shard, random_states

OPERATIONS = {
    "all_finite", "best_keys", "candidates", "dense_candidates", "probed_candidates",
    "score_centroids", "score_rows", "select_probes", "unpack_keys", "unpack_keys_into",
}  # fmt: skip
BOTH = pytest.mark.parametrize("ops", [cpu, reference], ids=["cpu", "reference"])
# (groups, clusters, tokens, hidden size, bits, scale group, pinned, rows' dtype)
SHAPES = [
    (3, 7, 4, 64, 4, 64, 0, torch.bfloat16),
    (4, 9, 2, 96, 4, 32, 3, torch.float32),
    (2, 6, 1, 48, 4, 12, 1, torch.float16),
    (3, 5, 1, 48, 8, 16, 1, torch.float16),
    (2, 9, 8, 200, 8, 40, 2, torch.bfloat16),
    (2, 9, 8, 256, 8, 128, 0, torch.bfloat16),
    (2, 9, 8, 640, 16, 640, 2, torch.bfloat16),
    (1, 1, 1, 64, 4, 64, 0, torch.bfloat16),
    # In tiles of sixteen clusters, of the usual and of other scale groups:
    (2, 32, 4, 640, 4, 64, 1, torch.bfloat16),
    (3, 16, 2, 96, 4, 32, 0, torch.float32),
    (2, 48, 1, 48, 4, 24, 2, torch.float16),
    (2, 16, 3, 128, 8, 64, 1, torch.bfloat16),
    (2, 16, 2, 200, 8, 40, 0, torch.bfloat16),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("batch", [0, 1, 3, 5])
def test_cpu_agrees_with_reference(shape, batch: int) -> None:  # type: ignore[no-untyped-def]
    shard = make_shard(*shape)
    states = random_states(batch, shape[3])
    for k in (1, 4):
        for probes in {1, (shape[1] + 1) // 2}:
            ours = candidates(cpu, shard, states, probes, k=k, need_logsumexp=True)
            theirs = candidates(reference, shard, states, probes, k=k, need_logsumexp=True)
            agree(ours, theirs)
    scores = cpu.score_centroids(states, shard, 0.05)
    expected = reference.score_centroids(states, shard, 0.05)
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-4)


@BOTH
@pytest.mark.parametrize("shape", SHAPES)
def test_probing_everything_is_the_dense_head(ops, shape) -> None:  # type: ignore[no-untyped-def]
    shard = make_shard(*shape)
    states = random_states(3, shape[3])
    logits, ids = every_logit(shard, states)
    # The cluster of pads is probed too; its huge rows must not win nor weigh.
    found = candidates(ops, shard, states, shape[1], k=2, need_logsumexp=True)
    if logits.shape[1] >= 2:
        top = logits.topk(2, dim=1)
        got, got_ids = unpack_keys(found.keys)
        assert torch.equal(got_ids, ids[top.indices].long())
        torch.testing.assert_close(got.double(), top.values, rtol=1e-5, atol=1e-4)
    truth = logits.logsumexp(1).float()
    torch.testing.assert_close(found.logsumexp, truth, rtol=1e-5, atol=1e-4)


@BOTH
def test_closed_form_of_unprobed_clusters(ops) -> None:  # type: ignore[no-untyped-def]
    """With clusters of one row, in 16 bits, the mean is the row: the closed form is exact."""
    shard = make_shard(2, 16, 1, 64, 16, 64, 0, torch.bfloat16)
    states = random_states(4, 64)
    truth = every_logit(shard, states)[0].logsumexp(1).float()
    found = candidates(ops, shard, states, 2, need_logsumexp=True).logsumexp
    torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-4)
    probed = candidates(ops, shard, states, 16).keys
    assert torch.equal(probed, candidates(ops, shard, states, 16, need_logsumexp=True).keys)


@BOTH
def test_fewer_tokens_than_k_leaves_empty_keys(ops) -> None:  # type: ignore[no-untyped-def]
    shard = make_shard(1, 2, 2, 64, 4, 64, 0, torch.bfloat16)
    keys = candidates(ops, shard, random_states(2, 64), 2, k=5).keys
    assert keys.shape == (2, 5)
    assert bool((keys[:, 1:] == EMPTY_KEY).all()), "one real token: one pad of four, a pad cluster"
    assert bool((keys[:, 0] != EMPTY_KEY).all())


@BOTH
def test_equal_logits_go_to_the_smallest_id(ops) -> None:  # type: ignore[no-untyped-def]
    shard = make_shard(4, 8, 4, 64, 4, 64, 0, torch.bfloat16)
    shard.rows[:] = shard.rows[0, 0, 0]
    keys = candidates(ops, shard, random_states(3, 64), 8, k=3).keys
    smallest = sorted(int(i) for i in shard.token_ids.flatten() if i >= 0)[:3]
    assert unpack_keys(keys)[1].tolist() == [smallest] * 3
    keys = candidates(ops, shard, torch.zeros(2, 64), 8).keys
    assert unpack_keys(keys)[1].tolist() == [[smallest[0]]] * 2


@BOTH
def test_select_probes_breaks_ties_by_slot(ops) -> None:  # type: ignore[no-untyped-def]
    scores = torch.tensor([[[1.0, 3.0, 1.0, -0.0, 1.0], [0.0, 0.0, 0.0, 0.0, 0.0]]])
    assert ops.select_probes(scores, 3).tolist() == [[[0, 1, 2], [0, 1, 2]]]


def test_fused_selection_equals_select_probes_on_awkward_scores() -> None:
    """The kernel's bisection over bit patterns: negative, equal, infinite and tiny scores."""
    from flashhead_kernels.cpu_loops import select_slots

    generator = torch.Generator().manual_seed(5)
    for trial in range(200):
        size = int(torch.randint(1, 70, (), generator=generator))
        scores = torch.randn(size, generator=generator)
        if trial % 3 == 0:
            scores = scores.round()
        if trial % 5 == 0:
            scores[torch.rand(size, generator=generator) < 0.3] = -torch.inf
        if trial % 7 == 0:
            scores = scores * 1e-42
        scores = scores + 0.0
        count = int(torch.randint(1, size + 1, (), generator=generator))
        slots = torch.empty(count, dtype=torch.int64)
        select_slots(scores.numpy(), count, torch.empty(size).int().numpy(), slots.numpy())
        expected = reference.select_probes(scores.view(1, 1, -1), count)[0, 0]
        assert slots.tolist() == expected.tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("count", [1, 127, 128, 4096, 9001])
@pytest.mark.parametrize("batch", [0, 1, 3, 6, 17])
def test_dense_candidates(dtype: torch.dtype, count: int, batch: int) -> None:
    generator = torch.Generator().manual_seed(count)
    rows = torch.randn(count, 96, generator=generator).to(dtype)
    rows[count // 2] = rows[0]
    states = random_states(batch, 96).to(dtype)
    if batch > 3:
        states[3] = 0
    for k in (1, 3):
        ours = cpu.dense_candidates(states, rows, 1000, k=k)
        both = cpu.dense_candidates(states, rows, 1000, k=k, need_logsumexp=True)
        theirs = reference.dense_candidates(states, rows, 1000, k=k, need_logsumexp=True)
        assert torch.equal(ours.keys, both.keys), "the matrix library's shortlist changed a key"
        assert torch.equal(unpack_keys(ours.keys)[1], unpack_keys(theirs.keys)[1])
        torch.testing.assert_close(both.logsumexp, theirs.logsumexp, rtol=1e-5, atol=1e-4)


def test_rounded_logits_alone_would_choose_other_tokens() -> None:
    """Why the dense head does not take the argmax of bfloat16 logits."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(20000, 64, generator=generator).to(torch.bfloat16)
    states = random_states(64, 64)
    exact = unpack_keys(cpu.dense_candidates(states, rows, 0).keys)[1].flatten()
    assert torch.equal(exact, (states.double() @ rows.double().T).argmax(1))
    rounded = torch.nn.functional.linear(states, rows).argmax(1)
    assert not torch.equal(rounded, exact)


def test_a_row_scores_the_same_bits_wherever_it_stands() -> None:
    """Sharding exactness rests on this: not on the batch, the shard, the threads or the kernel."""
    rows = torch.randn(300, 200, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    states = random_states(9, 200)
    whole = cpu.score_rows(states, rows.unsqueeze(1), torch.arange(300).expand(9, -1)).squeeze(2)
    for b, first, last in ((0, 0, 1), (3, 17, 120), (8, 299, 300)):
        part = rows[first:last].clone()
        alone = cpu.dense_candidates(states[b : b + 1], part, 0, k=last - first).keys
        expected = pack_keys(whole[b : b + 1, first:last], torch.arange(last - first))
        assert torch.equal(alone, expected.sort(dim=1, descending=True).values)
    batched = cpu.dense_candidates(states, rows, 0, k=300, need_logsumexp=True).keys
    expected = pack_keys(whole, torch.arange(300).expand(9, -1))
    assert torch.equal(batched, expected.sort(dim=1, descending=True).values)


def test_threads_do_not_change_a_bit() -> None:
    shard = make_shard(5, 40, 4, 128, 4, 64, 2, torch.bfloat16)
    states = random_states(3, 128)
    rows = torch.randn(20000, 128).to(torch.bfloat16)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found = candidates(cpu, shard, states, 5, k=3, need_logsumexp=True)
            dense = cpu.dense_candidates(states, rows, 0, k=2, need_logsumexp=True)
            results.append((found.keys, found.logsumexp, dense.keys, dense.logsumexp))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@BOTH
def test_probed_candidates_and_missing_clusters(ops) -> None:  # type: ignore[no-untyped-def]
    rows = torch.randn(12, 4, 64, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    ids = torch.arange(48).view(12, 4).int()
    clusters = torch.tensor([[3, -1, 5], [-1, -1, -1]], dtype=torch.int32)
    states = random_states(2, 64)
    keys = ops.probed_candidates(states, rows, ids, clusters, k=2)
    logits = states[0].double() @ torch.cat([rows[3], rows[5]]).double().T
    tokens = torch.cat([ids[3], ids[5]])[logits.topk(2).indices]
    assert unpack_keys(keys)[1].tolist() == [tokens.tolist(), [-1, -1]]
    assert ops.probed_candidates(states[:0], rows, ids, clusters[:0]).shape == (0, 1)


@BOTH
@pytest.mark.parametrize("threads", [1, 2])
def test_a_step_in_two_parts_gives_the_bits_of_one(ops: Any, threads: int) -> None:
    """Two threads share five groups unevenly, and a wrong stride mixes the batch's rows."""
    shard = make_shard(5, 19, 3, 64, 4, 32, 2, torch.bfloat16)
    states = torch.randn(3, 64, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    calls: list[None] = []
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        whole = candidates(ops, shard, states, 4, k=5, need_logsumexp=True)
        parts = candidates(
            ops, shard, states, 4, k=5, need_logsumexp=True,
            between=lambda: calls.append(None),
        )  # fmt: skip
    finally:
        torch.set_num_threads(before)
    assert len(calls) == 1
    assert torch.equal(whole.keys, parts.keys)
    assert whole.logsumexp is not None
    assert parts.logsumexp is not None
    assert torch.equal(whole.logsumexp, parts.logsumexp)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_greatest_and_smallest_floats_are_finite(ops: Any, dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    states = torch.tensor([[limits.max, limits.min, limits.tiny, -0.0, 0.0, 1.0]], dtype=dtype)
    states = torch.cat([states, states * 0 + limits.smallest_normal / 4])
    assert ops.all_finite(states)
    assert ops.all_finite(states[:0])


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_one_bad_number_is_seen_wherever_it_is(ops: Any, dtype: torch.dtype, bad: float) -> None:
    for place in (0, 7, 63, 127):
        states = torch.ones(2, 64, dtype=dtype)
        states.view(-1)[place] = bad
        assert not ops.all_finite(states)
        assert not ops.all_finite(states.T), "the memory's order must not matter"


@BOTH
@pytest.mark.parametrize("shape", [(0, 1), (1, 1), (3, 5)])
def test_keys_unpack_to_what_was_packed(ops: Any, shape: tuple[int, int]) -> None:
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


def test_wrong_arguments_are_named() -> None:
    shard = make_shard(*SHAPES[0])
    for ops in (cpu, reference):
        with pytest.raises(ValueError, match=r"do not fit \[B, 64\]"):
            candidates(ops, shard, random_states(2, 32), 2)
        with pytest.raises(ValueError, match="between 1 and 7, got 8"):
            candidates(ops, shard, random_states(2, 64), 8)
        with pytest.raises(ValueError, match="k must be at least 1"):
            candidates(ops, shard, random_states(2, 64), 2, k=0)


def test_devices_choose_their_operations() -> None:
    assert ops_for("cpu") is cpu
    assert ops_for("meta") is reference
    assert ops_for("cuda").__name__ == "flashhead_kernels.cuda"
    for ops in (cpu, ops_for("cuda")):
        assert set(dir(ops)) & set(dir(reference)) >= OPERATIONS


def test_missing_triton_is_named_with_its_remedy() -> None:
    script = "import sys; sys.modules['triton'] = None; import flashhead_kernels.dispatch as d"
    done = subprocess.run(
        [sys.executable, "-c", f"{script}; d.ops_for('cpu'); d.ops_for('cuda')"],
        capture_output=True,
        text=True,
    )
    assert done.stderr.strip().endswith(
        'ImportError: CUDA needs Triton: pip install -e ".[gpu]", or use --device cpu'
    )
