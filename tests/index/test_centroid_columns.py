"""An index whose centroids keep fewer columns: what it stores, counts and answers.

Mutated to see each fail: the projection left out of the bytes, its hash not looked at, its columns
in another order than the centroids', the fingerprint of options that leave columns alone.
"""

from __future__ import annotations

from math import inf
from pathlib import Path
from typing import Any

import pytest
import torch

from flashhead_dist.heads.base import HeadShape
from flashhead_dist.heads.flashhead_escalate import Escalation
from flashhead_dist.heads.registry import HEADS, HeadBuilder, build_head, emulate_head
from flashhead_dist.heads.sampling import SamplingParameters, choose_tokens
from flashhead_dist.index import HeadIndexError, IndexOptions, load_manifest, load_shard
from flashhead_dist.models import ModelSource, open_model
from flashhead_dist.parallel import TensorParallel
from flashhead_kernels import dispatch, reference

COLUMNS = {"centroid_columns": 32, "group_size": 16, "learned_pins_per_group": 0}


@pytest.fixture
def model(tied_model: Path) -> ModelSource:
    return open_model(str(tied_model))


def test_fewer_columns_find_what_all_of_them_find(
    build_one: Any, index_states: Any, model: ModelSource
) -> None:
    """Rows lie around forty centres in 64 columns: half of the columns tells them apart."""
    fewer, whole = build_one("fewer", **COLUMNS), build_one("whole", learned_pins_per_group=0)
    found = load_manifest(fewer).fidelity["top1_agreement"]
    assert found > load_manifest(whole).fidelity["top1_agreement"] - 0.03
    assert found > 0.9
    # That the scores are those of h . centroid, mean included, and not of some other scale.
    shard, states = load_shard(fewer).shard, index_states[1].states
    scores = reference.centroid_dots(states, shard.centroids)
    rows = shard.rows.float().sum(2) / shard.num_tokens.clamp(min=1).unsqueeze(-1)
    truth = torch.einsum("bd,nmd->bnm", states.float(), rows)
    real = (shard.num_tokens > 0).expand(truth.shape)
    error = (scores - truth)[real].square().mean().sqrt() / truth[real].std()
    assert float(error) < 0.35
    assert float((scores - truth)[real].mean().abs() / truth[real].std()) < 0.05


def test_the_spread_has_what_columns_leave_out(build_one: Any, index_states: Any) -> None:
    """By brute force over the calibration states. Fails where the spread is that of rows alone."""
    shard = load_shard(build_one(**COLUMNS)).shard
    unit = torch.nn.functional.normalize(index_states[0].states.double(), dim=1)
    real = (shard.token_ids >= 0).unsqueeze(-1)
    count = real.sum(2).clamp(min=1)
    centroids = shard.rows.double().sum(2) / count
    projection = shard.centroids.projection
    assert projection is not None
    kept = shard.centroids.dequantize().double() @ projection.to_state.double() + projection.mean
    left_out = torch.einsum("bd,gmd->bgm", unit, centroids - kept).square().mean(0)
    strays = (shard.rows.double() - centroids.unsqueeze(2)) * real
    of_rows = torch.einsum("bd,gmsd->bgms", unit, strays).square().mean(0).amax(-1)
    whole = shard.num_tokens > 1
    expected = (left_out + of_rows).sqrt()
    torch.testing.assert_close(shard.spread.double()[whole], expected[whole], rtol=2e-3, atol=0)
    assert float((left_out / of_rows)[whole].median()) > 0.01
    assert bool(torch.isneginf(shard.spread[shard.num_tokens == 0]).all())


@pytest.mark.parametrize("name", ["flashhead", "flashhead_escalate", "flashhead_global"])
def test_every_tp_size_answers_alike(
    build_one: Any, index_states: Any, model: ModelSource, name: str
) -> None:
    index = build_one(**COLUMNS)
    states = index_states[1].states[:60]
    outputs = [
        emulate_head(
            name, tp_size=size, model=model, index_dir=index, escalation=Escalation(margin=2.0)
        ).forward(states, k=2, need_logsumexp=True)
        for size in (1, 3, 5)
    ]
    for other in outputs[1:]:
        assert torch.equal(other.token_ids, outputs[0].token_ids)
        assert torch.equal(other.logits, outputs[0].logits)
        torch.testing.assert_close(other.logsumexp, outputs[0].logsumexp, rtol=1e-6, atol=0)


def test_draws_and_log_z_go_by_the_same_scores(
    build_one: Any, index_states: Any, model: ModelSource
) -> None:
    index, states = build_one(**COLUMNS), index_states[1].states[:40]
    dense = build_head("dense_local_max", tp=TensorParallel.single(), model=model)
    truth = dense.forward(states, need_logsumexp=True).logsumexp
    drawn = []
    for size in (1, 3):
        head = emulate_head("flashhead", tp_size=size, model=model, index_dir=index)
        found = head.forward(states, need_logsumexp=True).logsumexp
        assert found is not None
        assert truth is not None
        assert float((found - truth).abs().mean()) < 0.3
        places = torch.arange(40)
        parameters = SamplingParameters(temperature=1.0, seed=5)
        drawn.append(choose_tokens(head, states, places, places, parameters))
    assert torch.equal(*drawn)


@pytest.mark.parametrize("tp_size", [1, 3])
def test_bytes_are_counted_everywhere_alike(
    build_one: Any, model: ModelSource, tp_size: int
) -> None:
    manifest = load_manifest(index := build_one(**COLUMNS))
    assert manifest.centroid_columns == 32
    projection = 4 * 33 * 64
    clusters = 256 * (32 // 2 + 2 * 2)
    assert manifest.centroid_bytes == clusters + projection
    place = TensorParallel(tp_rank=0, tp_size=tp_size)
    shape = HeadShape.of_index(manifest)
    builder = HeadBuilder(tp=place, model=model, index_dir=index)
    for name in ("flashhead", "flashhead_global"):
        head = builder.build(name)
        for batch in (1, 4):
            work = HEADS[name].work(shape, tp_size, batch)
            assert work.read_bytes == head.read_bytes_per_step(batch)
            assert work.weight_bytes == head.weight_bytes
    if tp_size == 1:
        share = manifest.bytes_share * 1013 * 64 * 2
        assert builder.build("flashhead").read_bytes_per_row == pytest.approx(share)


def test_a_damaged_projection_is_noticed(build_one: Any) -> None:
    """It is in no group: the hashes of the groups know nothing of it."""
    index = build_one(**COLUMNS)
    load_shard(index)
    file = index / "index.safetensors"
    stored = bytearray(file.read_bytes())
    projection = load_shard(index).shard.centroids.projection
    assert projection is not None
    at = stored.find(projection.to_state.numpy().tobytes())
    assert at > 0
    stored[at + 100] ^= 1
    file.write_bytes(stored)
    with pytest.raises(HeadIndexError, match="is damaged"):
        load_shard(index, tp_rank=1, tp_size=2)


def test_triton_gives_the_tokens_of_the_cpu(
    build_one: Any, index_states: Any, model: ModelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("a CPU is played as CUDA by the interpreter")
    single = TensorParallel.single()
    head = build_head("flashhead", tp=single, model=model, index_dir=build_one(**COLUMNS))
    states = index_states[1].states[:3]
    expected = head.forward(states, k=2, need_logsumexp=True)
    monkeypatch.setitem(dispatch._MODULES, "cpu", "cuda")
    found = head.forward(states, k=2, need_logsumexp=True)
    assert torch.equal(found.token_ids, expected.token_ids)
    torch.testing.assert_close(found.logits, expected.logits)
    torch.testing.assert_close(found.logsumexp, expected.logsumexp, rtol=1e-4, atol=1e-4)


def test_indexes_without_it_are_what_they_were(tied_index: Path) -> None:
    """An index that users hold, or a cache, must not have to be built again."""
    assert IndexOptions().fingerprint() == "d97bf4bc22ce"
    assert IndexOptions(**COLUMNS).fingerprint() != IndexOptions(group_size=16).fingerprint()
    text = (tied_index / "manifest.json").read_text()
    assert "centroid_columns" not in text
    assert "shared_sha256" not in text
    assert load_manifest(tied_index).centroid_columns is None


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"centroid_columns": 100}, "100 centroid columns are no whole number of scale groups"),
        ({"centroid_columns": 0}, "0 centroid columns are no whole number"),
        ({"centroid_columns": 64, "centroid_bits": 16}, "16-bit centroids keep all"),
        ({"centroid_columns": 64}, "64 centroid columns are not fewer than the hidden size 64"),
    ],
)
def test_mistakes_are_named(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(HeadIndexError, match=complaint):
        IndexOptions(**options).check(1013, 64)


def test_without_hidden_states_all_directions_count_alike(
    build_one: Any, model: ModelSource, index_states: Any
) -> None:
    index = build_one("none", calibration=None, **COLUMNS)
    head = build_head(
        "flashhead_escalate",
        tp=TensorParallel.single(),
        model=model,
        index_dir=index,
        escalation=Escalation(margin=inf),
    )
    dense = build_head("dense_local_max", tp=TensorParallel.single(), model=model)
    states = index_states[1].states[:20]
    assert torch.equal(head.forward(states).token_ids, dense.forward(states).token_ids)
