"""kernels/bench.py, how it measures: every way right before it is timed, and the clocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import pytest
import torch

import bench_cell
import bench_ways as ways
import flashhead_kernels.cpu
import flashhead_kernels.reference
from bench_shapes import Shape, make_shard
from flashhead_kernels.keys import pack_keys
from flashhead_kernels.shard import Candidates
from flashhead_kernels.timing import HostClock, Run, clock_of

CPU = torch.device("cpu")
SHAPE = Shape("small", 4096, 64)


def a_bench(
    clock: object = None, ops: object = flashhead_kernels.cpu, **options: int
) -> bench_cell.Bench:
    return bench_cell.Bench("A", clock or HostClock(), ops, 3, seed=0, **options)


def a_copy(tp_size: int = 8) -> ways.Copy:
    shard = make_shard(SHAPE, tp_size, CPU, seed=0)
    return ways.Copy(shard, ways.Published.over(shard))


def some_states(batch_size: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(batch_size, 64, generator=draw, dtype=torch.bfloat16)


@pytest.mark.parametrize("tp_size", [1, 8])
def test_a_cell_holds_every_way_with_figures_that_fit(tp_size: int) -> None:
    cells: list[None] = []
    found = list(
        bench_cell.measure_shard(a_bench(), SHAPE, tp_size, [1, 3], lambda: cells.append(None))
    )
    names = [ways.FLASHHEAD, ways.DENSE_FUSED, ways.DENSE_TORCH, ways.PUBLISHED_EAGER]
    assert [(f.batch_size, f.way) for f in found] == [(b, n) for b in (1, 3) for n in names]
    assert len(cells) == 2
    for one in found:
        own = next(f for f in found if f.batch_size == one.batch_size)
        assert 0 < one.p10_us <= one.median_us <= one.p90_us
        assert one.gb_per_s == pytest.approx(one.read_bytes / (one.median_us * 1e-6) / 1e9)
        assert one.share_of_copy == pytest.approx(one.gb_per_s / one.copy_gb_per_s)
        assert one.times_flashhead == pytest.approx(one.median_us / own.median_us)
        assert (one.num_iterations, one.num_copies, one.steps_per_iteration) == (3, 2, 8)
        assert one.synthetic


def test_the_triton_kernels_are_measured_as_they_are() -> None:
    """On a GPU, or in Triton's interpreter: both launches, and their checks."""
    cuda = pytest.importorskip("flashhead_kernels.cuda")
    # Compiled kernels read no CPU tensors: the clock's device is where the weights are made.
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clock = clock_of(device)
    bench = a_bench(clock, cuda, least_steps=1, warm_up_rounds=0)
    tiny = Shape("tiny", 2048, 64)
    found = list(bench_cell.measure_shard(bench, tiny, 64, [2], lambda: None))
    assert {ways.FLASHHEAD, ways.TWO_LAUNCHES} < {one.way for one in found}
    assert bench.failures == []


def wrong_by(change: str) -> SimpleNamespace:
    """Operations whose first row's token, or logit alone, is not the reference's."""

    def spoilt(found: Candidates) -> Candidates:
        logits, ids = flashhead_kernels.reference.unpack_keys(found.keys)
        if change == "token":
            ids[0] += 1
        else:
            logits[0] += 0.1
        return Candidates(pack_keys(logits, ids), None)

    reference = flashhead_kernels.reference
    return SimpleNamespace(
        candidates=lambda *given: spoilt(reference.candidates(*given)),
        dense_candidates=lambda *given: spoilt(reference.dense_candidates(*given)),
    )


@pytest.mark.parametrize("change", ["token", "logit"])
def test_a_wrong_kernel_is_not_timed_and_the_other_ways_are(change: str) -> None:
    wrong, bench = wrong_by(change), a_bench(ops=wrong_by(change))
    found = list(bench_cell.measure_shard(bench, SHAPE, 8, [2], lambda: None))
    assert [one.way for one in found] == [ways.DENSE_TORCH, ways.PUBLISHED_EAGER]
    assert [one.times_flashhead for one in found] == [None, None]
    assert [failure.split(":")[0] for failure in bench.failures] == [
        "flashhead at small, tp 8, batch 2", "dense_fused at small, tp 8, batch 2"
    ]  # fmt: skip
    copy, states = a_copy(), some_states(2)
    for way in ways.make_ways(wrong, graphs=False)[:2]:
        with pytest.raises(ways.WrongResultError, match=way.name):
            way.check(copy, states, way.step(copy, states))


def test_a_kernel_that_raises_is_told_and_the_other_ways_are_measured() -> None:
    def fails(*given: object) -> Candidates:
        raise RuntimeError("no kernel image is available")

    ops = SimpleNamespace(
        candidates=flashhead_kernels.reference.candidates,
        dense_candidates=fails,
    )
    bench = a_bench(ops=ops)
    found = list(bench_cell.measure_shard(bench, SHAPE, 8, [1], lambda: None))
    assert [one.way for one in found] == [ways.FLASHHEAD, ways.DENSE_TORCH, ways.PUBLISHED_EAGER]
    (failure,) = bench.failures
    assert "dense_fused at small, tp 8, batch 1" in failure
    assert "no kernel image" in failure


def keys_of(logit: float, token: int) -> torch.Tensor:
    return pack_keys(torch.tensor([[logit]]), torch.tensor([[token]]))


@pytest.mark.parametrize("place", [0, 1])
def test_a_token_that_ties_within_rounding_is_right_and_counted(place: int) -> None:
    """Two rows that differ by less than float32 sums can show; a third that is plainly lower."""
    copy, states = a_copy(1), some_states(1)
    way = ways.make_ways(flashhead_kernels.reference, graphs=False)[place]
    best = int(flashhead_kernels.reference.unpack_keys(way.step(copy, states))[1])
    ids, rows = copy.shard.token_ids.flatten(), copy.shard.rows.flatten(0, 2)
    at = int((ids == best).nonzero()) if place == 0 else best
    near, lower = at ^ 1, at ^ 2  # of the same cluster
    table = rows if place == 0 else copy.shard.dense_rows
    table[near] = table[at]
    column = int(states[0].double().abs().argmin())
    table[near, column] = 0  # and so not the same sum
    table[at, column] = 1e-6
    names = [int(ids[i]) if place == 0 else i for i in (at, near, lower)]
    logits = (table[[at, near, lower]].double() @ states[0].double()).tolist()
    assert 0 < abs(logits[0] - logits[1]) < 1e-6 < logits[0] - logits[2]
    first = int(flashhead_kernels.reference.unpack_keys(way.step(copy, states))[1])
    for logit, token in zip(logits[:2], names, strict=False):
        found = way.check(copy, states, keys_of(logit, token))
        assert (found.tokens, found.ties) == (1, int(token != first))
    with pytest.raises(ways.WrongResultError, match="no tie"):
        way.check(copy, states, keys_of(logits[2], names[2]))
    with pytest.raises(ways.WrongResultError, match="gave logit"):
        way.check(copy, states, keys_of(logits[0] + 1e-3, names[0]))
    with pytest.raises(ways.WrongResultError, match="no token"):
        way.check(copy, states, keys_of(logits[0], 5000))


def test_a_wrong_torch_way_is_not_timed() -> None:
    copy, states = a_copy(), some_states(3)
    for way in ways.make_ways(flashhead_kernels.cpu, graphs=False)[2:]:
        ids = way.step(copy, states)
        way.check(copy, states, ids)
        ids[1] = (ids[1] + 100) % (len(copy.published.clusters) * 16)
        with pytest.raises(ways.WrongResultError, match="below the greatest"):
            way.check(copy, states, ids)


def test_the_published_scheme_with_every_cluster_is_the_dense_argmax() -> None:
    copy, states = a_copy(1), some_states(20)
    published = copy.published
    assert (len(published.clusters), published.num_probes) == (256, 16)
    every = ways.Published(published.clusters, published.centroids, 256)
    logits = states @ copy.shard.dense_rows.T
    best = logits.gather(1, every(states)[:, None])[:, 0]
    assert torch.equal(best, logits.max(1).values)
    assert torch.allclose(published.centroids.float().norm(dim=1), torch.ones(256), atol=0.01)


def test_bytes_of_each_way() -> None:
    copy, states = a_copy(1), some_states(2).expand(3, -1, -1)
    published = 256 * 64 * 2 + 2 * 64 * 2  # centroids and states
    union = len(torch.unique(copy.published.probes(states[0])))
    assert 16 <= union <= 32
    assert ways.read_bytes(ways.PUBLISHED_GRAPH, copy, states) == published + union * 16 * 64 * 2
    assert ways.read_bytes(ways.DENSE_TORCH, copy, states) == copy.shard.dense_bytes(2)
    clusters = copy.shard.count_clusters_read(states)
    assert ways.read_bytes(ways.TWO_LAUNCHES, copy, states) == copy.shard.flashhead_bytes(
        clusters, 2
    )


class NoCapture(HostClock):
    """A clock with graphs that cannot hold what `refused` marks by raising."""

    graphs = True

    def __init__(self, refused: int) -> None:
        super().__init__()
        self.refused, self.captured = refused, 0

    def capture(
        self, steps: Sequence[Callable[[], torch.Tensor]]
    ) -> tuple[Run, list[torch.Tensor]]:
        self.captured += 1
        if self.captured == self.refused:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        return bench_cell._keep_results(steps)


def test_only_the_published_graph_may_fail_to_be_captured() -> None:
    clock = NoCapture(refused=4)
    bench = a_bench(clock)
    found = list(bench_cell.measure_shard(bench, SHAPE, 8, [1], lambda: None))
    assert ways.PUBLISHED_GRAPH not in [one.way for one in found]
    assert bench.notes == [
        "published_graph is left out where a CUDA graph cannot hold it: RuntimeError: operation "
        "not permitted when stream is capturing"
    ]
    timings = {one.way: one.timing for one in found}
    assert timings[ways.PUBLISHED_EAGER] == "wall clock, launches included"
    assert timings[ways.FLASHHEAD] == "wall clock, graph replay"
    assert bench.failures == []
    bench = a_bench(NoCapture(1))
    list(bench_cell.measure_shard(bench, SHAPE, 8, [1], lambda: None))
    assert "flashhead at small, tp 8, batch 1: RuntimeError" in bench.failures[0]


def test_every_way_runs_once_a_round_and_none_always_first() -> None:
    order: list[str] = []

    def prepared(name: str) -> bench_cell._Prepared:
        way = ways.Way(name, lambda *_: torch.zeros(1), lambda *_: None)
        return bench_cell._Prepared(way, lambda: order.append(name), [], "", ways.Checked(0, 0))

    times = bench_cell._time(a_bench(), [prepared(name) for name in "abc"], 4)
    rounds = ["".join(order[i : i + 3]) for i in range(0, len(order), 3)]
    assert rounds == ["abc", "bca", "cab"] * 2  # warm-up, then the three that are kept
    assert {name: len(kept) for name, kept in times.items()} == {"a": 3, "b": 3, "c": 3}
