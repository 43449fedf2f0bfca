"""Heads in one process: what they hold, what they choose, and what they count."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from flashhead_dist.errors import UserError
from flashhead_dist.heads.base import Head, VocabShard, Want
from flashhead_dist.heads.registry import HEADS, HeadBuilder, build_head, emulate_head
from flashhead_dist.index import load_manifest
from flashhead_dist.models import ModelSource, open_model
from flashhead_dist.parallel import TensorParallel
from flashhead_kernels import reference

INDEX_HEADS = ("flashhead", "flashhead_global", "flashhead_replicated")
NUM_CLUSTERS = 256


@pytest.fixture(scope="module")
def model(tied_model: Path) -> ModelSource:
    return open_model(str(tied_model))


@pytest.fixture(scope="module")
def builder(model: ModelSource, tied_index: Path) -> HeadBuilder:
    return HeadBuilder(tp=TensorParallel.single(), model=model, index_dir=tied_index)


@pytest.fixture(scope="module")
def states() -> torch.Tensor:
    """States that point at no row: their softmax is flat, and retrieval often misses the best."""
    draw = torch.Generator().manual_seed(11)
    return (0.4 * torch.randn(60, 64, generator=draw)).to(torch.bfloat16)


def test_shards_cover_a_vocabulary_evenly_and_in_order() -> None:
    for size, tp_size in ((1013, 3), (1013, 5), (7, 7), (8, 3), (262144, 8)):
        shards = [
            VocabShard.of(size, TensorParallel(tp_rank=rank, tp_size=tp_size))
            for rank in range(tp_size)
        ]
        bounds = [(shard.start, shard.stop) for shard in shards]
        assert bounds[0][0] == 0
        assert bounds[-1][1] == size
        assert all(left[1] == right[0] for left, right in pairwise(bounds))
        lengths = [stop - start for start, stop in bounds]
        assert max(lengths) - min(lengths) <= 1
        assert {shard.width for shard in shards} == {max(lengths)}


@pytest.mark.parametrize("name", INDEX_HEADS)
def test_probing_every_cluster_is_the_dense_head_bit_for_bit(
    builder: HeadBuilder, states: torch.Tensor, name: str
) -> None:
    everything = builder.build(name, num_probes=NUM_CLUSTERS)
    found = everything.forward(states, k=7, need_logsumexp=True)
    dense = builder.build("dense_local_max").forward(states, k=7, need_logsumexp=True)
    assert torch.equal(found.token_ids, dense.token_ids)
    assert torch.equal(found.logits, dense.logits)
    assert found.logsumexp is not None
    assert dense.logsumexp is not None
    assert torch.allclose(found.logsumexp, dense.logsumexp, rtol=1e-6)


@pytest.mark.parametrize("name", [*INDEX_HEADS, "dense_local_max"])
def test_a_row_is_served_alike_alone_and_in_a_batch(
    builder: HeadBuilder, states: torch.Tensor, name: str
) -> None:
    head = builder.build(name)
    together = head.forward(states, k=3)
    for row in range(0, len(states), 7):
        alone = head.forward(states[row : row + 1], k=3)
        assert torch.equal(alone.token_ids[0], together.token_ids[row])
        assert torch.equal(alone.logits[0], together.logits[row])


def _oracle(head: Head, builder: HeadBuilder, states: torch.Tensor, probes: int) -> torch.Tensor:
    """Best token `[B]` among the clusters that a plain reading of the rule probes, and the pins."""
    shard = builder.index_shard.shard
    scores = reference.score_centroids(states, shard, builder.manifest.alpha)
    groups, clusters = scores.shape[1:]
    chosen = []
    for row, row_scores in zip(states.float(), scores, strict=True):
        order = [
            (-float(row_scores[g, t]), t * groups + g, g, t)
            for g in range(groups)
            for t in range(clusters)
        ]
        if head.name == "flashhead_global":
            kept = sorted(order)[:probes]
        else:
            kept = [
                entry
                for g in range(groups)
                for entry in sorted(e for e in order if e[2] == g)[: probes // groups]
            ]
        best = (float("-inf"), 0)
        for _, _, g, t in kept:
            for slot, token in enumerate(shard.token_ids[g, t].tolist()):
                if token >= 0:
                    logit = float(row.double() @ shard.rows[g, t, slot].double())
                    best = max(best, (round(logit, 4), -token))
        for g in range(groups):
            for slot, token in enumerate(shard.pinned_token_ids[g].tolist()):
                if token >= 0:
                    logit = float(row.double() @ shard.pinned_rows[g, slot].double())
                    best = max(best, (round(logit, 4), -token))
        chosen.append(-best[1])
    return torch.tensor(chosen)


@pytest.mark.parametrize("probes", [8, 16])
@pytest.mark.parametrize("name", ["flashhead", "flashhead_global"])
def test_the_token_is_the_best_of_the_clusters_that_the_rule_probes(
    builder: HeadBuilder, states: torch.Tensor, name: str, probes: int
) -> None:
    head = builder.build(name, num_probes=probes)
    found = head.forward(states).token_ids[:, 0]
    assert torch.equal(found, _oracle(head, builder, states, probes))
    assert not torch.equal(found, builder.build("dense_local_max").forward(states).token_ids[:, 0])


@pytest.mark.parametrize("tp_size", [1, 2, 3, 5, 8])
def test_equal_scores_everywhere_probe_the_first_clusters_of_the_tree(
    builder: HeadBuilder, model: ModelSource, tied_index: Path, tp_size: int
) -> None:
    """A state of zeros ties every score and every logit: only the rules of ties choose."""
    shard = builder.index_shard.shard
    head = emulate_head(
        "flashhead_global", tp_size=tp_size, model=model, index_dir=tied_index, num_probes=11
    )
    tree = shard.token_ids.transpose(0, 1).flatten(0, 1)[:11]
    ids = torch.cat([tree.flatten(), shard.pinned_token_ids.flatten()])
    smallest = ids[ids >= 0].sort().values[:3]
    found = head.forward(torch.zeros(2, 64), k=3)
    assert found.token_ids.tolist() == [smallest.tolist()] * 2
    assert found.logits.tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize("name", INDEX_HEADS)
def test_logsumexp_lies_between_the_candidates_and_the_truth(
    builder: HeadBuilder, states: torch.Tensor, name: str
) -> None:
    output = builder.build(name).serve(states, Want(k=2, logsumexp=True, candidate_mass=True))
    dense = builder.build("dense_local_max").forward(states, need_logsumexp=True).logsumexp
    assert output.logsumexp is not None
    assert output.candidate_logsumexp is not None
    assert dense is not None
    assert bool((output.candidate_logsumexp < output.logsumexp).all())
    # Jensen: a cluster's mean underestimates its mass; int4 rounding may lift it a little.
    assert bool((output.logsumexp < dense + 0.02).all())
    assert float((output.logsumexp - dense).abs().mean()) < float(
        (output.candidate_logsumexp - dense).abs().mean()
    )


def test_bytes_read_are_those_that_the_index_promises(
    builder: HeadBuilder, model: ModelSource, tied_index: Path
) -> None:
    manifest = load_manifest(tied_index)
    dense_bytes = 1013 * 64 * 2
    for tp_size in (1, 3):
        head = emulate_head("flashhead", tp_size=tp_size, model=model, index_dir=tied_index)
        assert head.read_bytes_per_row == pytest.approx(manifest.bytes_share * dense_bytes)
    replicated = emulate_head("flashhead_replicated", tp_size=3, model=model, index_dir=tied_index)
    assert replicated.read_bytes_per_row == pytest.approx(3 * manifest.bytes_share * dense_bytes)
    dense = emulate_head("dense_local_max", tp_size=3, model=model)
    assert dense.read_bytes_per_row == dense_bytes
    head = builder.build("flashhead")
    assert head.read_bytes_per_step(0) == 0
    assert head.read_bytes_per_step(1) < head.read_bytes_per_step(4)
    assert head.read_bytes_per_step(1000) == head.weight_bytes


def test_no_rank_holds_more_than_its_share(
    builder: HeadBuilder, model: ModelSource, tied_index: Path
) -> None:
    """Eight groups over four ranks: two each. Dense rows differ by one at most."""
    for name in ("flashhead", "flashhead_global", "dense_gather", "dense_local_max"):
        whole = builder.build(name).weight_bytes
        head = emulate_head(name, tp_size=4, model=model, index_dir=tied_index)
        assert head.weight_bytes_per_rank <= whole / 4 * 1.05
    replicated = emulate_head("flashhead_replicated", tp_size=4, model=model, index_dir=tied_index)
    assert replicated.weight_bytes_per_rank == builder.build("flashhead").weight_bytes


def test_heads_of_one_rank_share_weights(builder: HeadBuilder) -> None:
    rows = {builder.build(name).weight.data_ptr() for name in ("dense_gather", "dense_local_max")}
    assert len(rows) == 1
    shards = {builder.build(name).shard.rows.data_ptr() for name in INDEX_HEADS}
    assert len(shards) == 1


def test_dtype_is_that_of_the_rows_and_hidden_states_may_differ(
    model: ModelSource, tied_index: Path, states: torch.Tensor
) -> None:
    for name in HEADS:
        single = TensorParallel.single()
        head = build_head(name, tp=single, model=model, index_dir=tied_index, dtype=torch.float32)
        bf16 = build_head(name, tp=single, model=model, index_dir=tied_index)
        assert head.weight_bytes > 1.3 * bf16.weight_bytes
        same = head.forward(states).token_ids == head.forward(states.float()).token_ids
        assert bool(same.all())


def test_faiss_reads_as_much_as_flashhead_unless_told_otherwise(
    builder: HeadBuilder, states: torch.Tensor
) -> None:
    default = builder.build("faiss_ivf")
    one_list = 1013 / default.num_lists * (64 * 2 + 8)
    budget = builder.manifest.centroid_bytes + 16 * 4 * 64 * 2
    assert abs(default.read_bytes_per_row - budget) <= max(one_list, default._centroid_bytes)
    everything = builder.build("faiss_ivf", num_probes=default.num_lists)
    found = everything.serve(states, Want(k=3, candidate_mass=True))
    dense = builder.build("dense_local_max").forward(states, k=3, need_logsumexp=True)
    assert torch.allclose(found.logits, dense.logits, rtol=1e-5)
    assert found.candidate_logsumexp is not None
    assert dense.logsumexp is not None
    assert torch.allclose(found.candidate_logsumexp, dense.logsumexp, rtol=1e-5)
    with pytest.raises(UserError, match="no log-sum-exp"):
        default.forward(states, need_logsumexp=True)


def test_padding_of_uneven_shards_adds_nothing(model: ModelSource) -> None:
    """Zero logits everywhere: padding with anything but -inf would show in the log-sum-exp."""
    head = emulate_head("dense_gather", tp_size=3, model=model, dtype=torch.float32)
    output = head.forward(torch.zeros(1, 64), k=1013, need_logsumexp=True)
    assert output.token_ids[0].tolist() == list(range(1013))
    assert output.logsumexp is not None
    assert float(output.logsumexp[0]) == pytest.approx(math.log(1013), rel=1e-6)


@pytest.mark.parametrize("name", HEADS)
def test_every_token_has_its_own_logit_on_every_rank(
    model: ModelSource, tied_index: Path, states: torch.Tensor, name: str
) -> None:
    head = emulate_head(name, tp_size=3, model=model, index_dir=tied_index, dtype=torch.float32)
    output = head.forward(states, k=20)
    expected = states.double() @ model.read_rows(0, 1013).double().T
    # faiss may find fewer than twenty.
    found = output.token_ids >= 0
    scored = expected.gather(1, output.token_ids.clamp(min=0))[found]
    assert torch.allclose(output.logits[found].double(), scored, rtol=1e-4, atol=1e-4)
    assert bool(output.logits[~found].isneginf().all())
    # All three ranks contribute, each with several tokens a state.
    assert (output.token_ids[found] // 338).unique().tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", [n for n in HEADS if n != "faiss_ivf"])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_one_row_on_one_rank_has_a_log_sum_exp(
    builder: HeadBuilder, states: torch.Tensor, name: str, k: int
) -> None:
    """The packed words of one row may be odd in number."""
    head = builder.build(name)
    one = head.forward(states[:1], k=k, need_logsumexp=True)
    two = head.forward(states[:2], k=k, need_logsumexp=True)
    assert torch.equal(one.token_ids, two.token_ids[:1])
    assert one.logsumexp is not None
    assert two.logsumexp is not None
    assert torch.allclose(one.logsumexp, two.logsumexp[:1], rtol=1e-5)
